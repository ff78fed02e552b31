"""The numbers of the papers, beside which tables.py puts ours."""

from collections import defaultdict

SETTINGS = {
    "2mode-dagger": {"miniimagenet", "fc100"},
    "2mode": {"omniglot", "miniimagenet"},
    "3mode": {"omniglot", "miniimagenet", "fc100"},
    "5mode": {"omniglot", "miniimagenet", "fc100", "cub", "aircraft"},
}
TABLE1 = {  # KML paper, Table 1: overall accuracy and interval in %, 1-shot and 5-shot
    "2mode-dagger": {
        "MAML": ((40.53, 0.68), (54.11, 0.63)),
        "Multi-MAML": ((39.27, 0.76), (53.51, 0.72)),
        "MMAML": ((39.11, 0.62), (52.02, 0.63)),
        "MMAML+KML": ((40.73, 0.66), (53.72, 0.60)),
        "ProtoNet": ((43.05, 0.58), (57.70, 0.59)),
        "Multi-ProtoNet": ((43.42, 0.56), (56.73, 0.64)),
        "MProtoNet": ((43.57, 0.59), (56.03, 0.64)),
        "MProtoNet+KML": ((44.40, 0.65), (59.31, 0.62)),
    },
    "2mode": {
        "MAML": ((65.18, 0.61), (74.18, 0.57)),
        "Multi-MAML": ((66.77, 0.68), (73.07, 0.61)),
        "MMAML": ((67.67, 0.63), (73.52, 0.71)),
        "MMAML+KML": ((68.01, 0.59), (77.02, 0.66)),
        "ProtoNet": ((69.55, 0.54), (75.12, 0.41)),
        "Multi-ProtoNet": ((70.17, 0.61), (75.33, 0.46)),
        "MProtoNet": ((70.60, 0.56), (75.72, 0.47)),
        "MProtoNet+KML": ((73.69, 0.52), (79.82, 0.40)),
    },
    "3mode": {
        "MAML": ((54.40, 0.56), (66.51, 0.54)),
        "Multi-MAML": ((56.01, 0.66), (65.92, 0.62)),
        "MMAML": ((57.35, 0.61), (64.21, 0.57)),
        "MMAML+KML": ((57.68, 0.59), (67.12, 0.55)),
        "ProtoNet": ((58.14, 0.49), (66.84, 0.44)),
        "Multi-ProtoNet": ((59.89, 0.50), (67.03, 0.44)),
        "MProtoNet": ((59.62, 0.54), (67.51, 0.47)),
        "MProtoNet+KML": ((62.08, 0.54), (70.03, 0.43)),
    },
    "5mode": {
        "MAML": ((47.19, 0.49), (58.13, 0.48)),
        "Multi-MAML": ((48.33, 0.58), (59.20, 0.52)),
        "MMAML": ((49.53, 0.50), (58.89, 0.47)),
        "MMAML+KML": ((50.31, 0.49), (60.51, 0.47)),
        "ProtoNet": ((49.31, 0.53), (58.91, 0.51)),
        "Multi-ProtoNet": ((50.69, 0.57), (59.88, 0.54)),
        "MProtoNet": ((51.75, 0.52), (59.95, 0.42)),
        "MProtoNet+KML": ((56.72, 0.46), (64.91, 0.38)),
    },
}
TABLE2 = {  # KML paper, Table 2: the same of each mode of 2mode-dagger
    "miniimagenet": {
        "MAML": ((44.11, 0.88), (59.34, 0.78)),
        "Multi-MAML": ((41.70, 0.91), (60.03, 0.88)),
        "MMAML": ((42.70, 0.86), (56.93, 0.78)),
        "MMAML+KML": ((44.01, 0.82), (58.95, 0.76)),
        "ProtoNet": ((45.62, 0.82), (61.74, 0.75)),
        "Multi-ProtoNet": ((47.19, 0.58), (61.11, 0.53)),
        "MProtoNet": ((47.06, 0.80), (60.56, 0.77)),
        "MProtoNet+KML": ((48.34, 0.86), (61.20, 0.77)),
    },
    "fc100": {
        "MAML": ((37.01, 0.82), (49.01, 0.73)),
        "Multi-MAML": ((36.84, 0.81), (47.08, 0.74)),
        "MMAML": ((35.50, 0.75), (47.11, 0.77)),
        "MMAML+KML": ((37.47, 0.86), (48.45, 0.76)),
        "ProtoNet": ((40.36, 0.76), (53.66, 0.77)),
        "Multi-ProtoNet": ((39.61, 0.54), (52.35, 0.57)),
        "MProtoNet": ((40.09, 0.77), (51.50, 0.83)),
        "MProtoNet+KML": ((40.48, 0.77), (54.42, 0.76)),
    },
}
MODGRAD = {  # ModGrad paper, Table 2, 4 (steps) and 5 (u): accuracy and, if given, interval in %, 1-shot and 5-shot
    "ModGrad": ((53.20, 0.86), (69.17, 0.69)),
    "MAML": ((47.89, 1.20), (64.59, 0.88)),
    "Meta-SGD": ((50.50, 1.90), (64.00, 0.90)),
    "CAVIA": ((51.82, 0.65), (65.85, 0.55)),  # with 512 channels
    "T-Net": ((51.70, 1.84), None),
    "ModGrad, wrn28-10, `--augment`": ((65.72, 0.21), (81.17, 0.20)),
    "ModGrad, `--steps 2`": (52.66, 68.80),
    "ModGrad, `--steps 3`": (53.54, 68.42),
    "ModGrad, `--steps 4`": (52.87, 68.34),
    "ModGrad, `--steps 5`": (52.76, 68.24),
    "ModGrad, `--rank 1`": (53.13, 68.43),
    "ModGrad, `--rank 10`": (52.53, 67.62),
}
# ModGrad paper, Table 3: CelebA, mean squared error by (pixels, order)
COMPLETION = defaultdict(
    dict,
    {
        "CNP": {
            (10, "random"): 0.039,
            (100, "random"): 0.016,
            (10, "ordered"): 0.057,
            (100, "ordered"): 0.047,
        },
        "MAML": {
            (10, "random"): 0.040,
            (100, "random"): 0.017,
            (10, "ordered"): 0.055,
            (100, "ordered"): 0.047,
        },
        "CAVIA": {
            (10, "random"): 0.037,
            (100, "random"): 0.014,
            (10, "ordered"): 0.053,
            (100, "ordered"): 0.047,
        },
        "ModGrad": {
            (10, "random"): 0.034,
            (100, "random"): 0.012,
            (10, "ordered"): 0.048,
            (100, "ordered"): 0.043,
        },
    },
)
# ModGrad paper, Figure 5: accuracy in %
MULTISHOT = defaultdict(lambda: "", {"ModGrad": 85.1, "LEAP": 83.3, "Reptile": 76.4})
# ModGrad paper, Figure 8: return after one update, as its text says
RL = defaultdict(
    dict,
    {
        "MAML": {"navigation": "-15", "cheetah-dir": "below 550", "cheetah-vel": "-100"},
        "CAVIA": {"navigation": "-15", "cheetah-dir": "below 550", "cheetah-vel": "-90"},
        "ModGrad": {"navigation": "-8", "cheetah-dir": "590", "cheetah-vel": "-80"},
    },
)
AFR_TABLE1 = {  # attentive feature reuse, Table 1, on MMT: classification, depth (error in 1e-3), vanishing, normals: accuracy, error
    "single": {
        "ANIL": {
            32: ((37.7,), (86.5, 0.543), (10.5, 0.1058), (8.9, 0.0936)),
            64: ((38.42,), (81.4, 0.384), (11.1, 0.103), (12.03, 0.095)),
        },
        "AM": {
            32: ((39.6,), (87.8, 0.495), (17.6, 0.0823), (11.4, 0.0841)),
            64: ((39.45,), (88.6, 0.361), (16.8, 0.071), (14.5, 0.082)),
        },
    },
    "multi": {
        "ANIL": {
            32: ((37.88,), (80.71, 0.698), (11.3, 0.1183), (9.4, 0.0842)),
            64: ((39.94,), (76.1, 0.867), (13.8, 0.103), (12.5, 0.066)),
        },
        "AM": {
            32: ((39.07,), (78.06, 0.852), (17.4, 0.081), (13.6, 0.0621)),
            64: ((39.99,), (85.3, 0.527), (16.2, 0.088), (12.5, 0.0613)),
        },
    },
}
# Attentive feature reuse, Table 2: mini-ImageNet, 5 ways, in %: (CE, NIL) of 1-shot and of 5-shot
AFR_TABLE2 = defaultdict(
    dict,
    {
        "MAML": {"M": ((48.7, 49.1), (63.1, "-"))},
        "ANIL": {"M": ((48.1, 49.5), (61.0, "-"))},
        "AM": {"M": ((51.1, 52.3), (64.6, "-"))},
        "P-AM": {"M": ((48.9, 50.2), (63.17, "-"))},
    },
)
AFR_TRANSFER = {
    "MAML": (31.2, 33.8),
    "ANIL": (32.7, 33.9),
    "AM": (33.5, 34.3),
    "P-AM": (32.6, 34.1),
}  # Table 2, mini-Places, CE and NIL
