"""Student's t, for intervals of few values."""

# Student's t: 97.5 % quantiles, of 1, 2, ... degrees of freedom.
STUDENT = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
    2.120,
    2.110,
    2.101,
    2.093,
    2.086,
    2.080,
    2.074,
    2.069,
    2.064,
    2.060,
    2.056,
    2.052,
    2.048,
    2.045,
    2.042,
)


def student(n):
    """Half the width of a 95 % interval of the mean of n >= 2 values, in standard errors: Student's t; 1.96 from n = 32 on."""
    return STUDENT[n - 2] if 2 <= n < 32 else 1.96
