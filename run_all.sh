#!/usr/bin/env bash
# Every table of the papers, one command per cell (tools/cells.py is the list). A cell is named paper/setting/shots/method, and its run lives in a folder of
# that name. Finished cells are skipped, broken ones continue, a failed one does not stop the others; tools/tables.py comes last.
usage="usage: bash run_all.sh [--dry-run] [--only GLOB]... [--quick] [--synthetic] [--jobs N] [--out FOLDER] [-- FLAG...]

  --dry-run    print the commands, one per line, each complete in itself, and run nothing
  --only GLOB  only the cells whose name matches, as 'kml/2mode/5shot/*'; may be given several times
  --quick      the scripts' two-minute budget in place of the papers'
  --synthetic  procedural images in place of the real ones: no download
  --jobs N     N cells at a time (1), which share the cores; each one's output goes to output.txt in its folder
  --out FOLDER where the runs go (runs; with --quick runs/quick, with --synthetic runs/synthetic, ...)
  -- FLAG...   flags for every command, which win: -- --image-size 28 --iterations 4000; give another --out with them

Ctrl-C ends the running cells with a checkpoint; the same command (without -- --overwrite) continues. Python is that of .venv, if there is one, or of
the variable PYTHON. Status 1: a cell failed or is not finished; it is named at the end."
set -u
cd "$(dirname "$0")" || exit 1

fail() { echo "error: $1" >&2; exit 2; }

again="the same command" only=() places=() jobs=1 dry="" quick="" synthetic="" out="" extra=""
while [ $# -gt 0 ]; do
    case "$1" in
        --dry-run) dry=1 ;;
        --quick) quick=" --quick" ;;
        --synthetic) synthetic=" --synthetic" ;;
        --only | --jobs | --out)
            [ $# -gt 1 ] || fail "$1 needs a value"
            [ -n "$2" ] || fail "$1 needs a value, not an empty one"
            case "$1" in --only) only+=("$2") ;; --jobs) jobs=$2 ;; --out) out=$2 ;; esac
            shift ;;
        --) shift
            [ $# -eq 0 ] || extra=$(printf " %q" "$@")
            while [ $# -gt 0 ]; do
                case "$1" in
                    --data-root | --cache-dir) [ $# -eq 1 ] || places+=("$1" "$2") ;;
                    --data-root=* | --cache-dir=*) places+=("$1") ;;
                    --overwrite) again="the same command without --overwrite" ;;
                esac
                shift
            done
            break ;;
        -h | --help) echo "$usage"; exit ;;
        *) fail "$1 is no flag of run_all.sh (see --help); flags for the scripts go after --" ;;
    esac
    shift
done
case "$jobs" in *[!0-9]*) fail "--jobs $jobs: give a whole number from 1 on" ;; esac
jobs=$((10#$jobs))
[ $jobs -ge 1 ] || fail "--jobs $jobs: give a whole number from 1 on"
folder=${out:-runs${quick:+/quick}${synthetic:+/synthetic}}
if [ -z "${PYTHON:-}" ]; then PYTHON=python; [ ! -x .venv/bin/python ] || PYTHON=.venv/bin/python; fi
python=$(printf %q "$PYTHON")

# The cells: names and commands, from the one list.
names=() commands=()
list=$("$PYTHON" -m tools.cells ${only[@]+"${only[@]}"} ${quick:+--quick} ${synthetic:+--synthetic}) || exit 2
while IFS=$'\t' read -r name command; do
    [ -n "$name" ] || continue
    names+=("$name")
    commands+=("$python $command$extra --out $(printf %q "$folder/$name")")
done <<<"$list"

# ---------------------------------------------------------------------------------------------------------- running them
# Whether cell $1 is finished: its last call that reached a result had this very command, and the result is still there.
# (A run that trains on removes it.)
finished() {
    local at="$folder/${names[$1]}"
    [ "$(cat "$at/command.txt" 2>/dev/null)" = "${commands[$1]}" ] && [ -s "$at/result.json" ]
}

if [ -n "$dry" ]; then
    for i in "${!names[@]}"; do
        if finished "$i"; then echo "${commands[$i]}    # finished"; else echo "${commands[$i]}"; fi
    done
    exit
fi

failures=$(mktemp) || exit 1
stopped=""
trap 'rm -f "$failures"' EXIT
# Each cell is a process group of its own (set -m): a signal to all of this script's group then reaches a cell once, from here;
# a second one would end it without a checkpoint.
set -m
trap 'stopped=1; kill -TERM $(jobs -p) 2>/dev/null' INT TERM HUP

failed() { echo "${names[$1]} ($2)" >>"$failures"; }

run() {     # cell $1, in the background. A second one in the same folder is refused by the script, which names the first
    local at="$folder/${names[$1]}" child="" told="" status
    trap 'told=1; [ -z "$child" ] || kill -TERM $child 2>/dev/null' INT TERM HUP
    mkdir -p "$at" || { failed "$1" "its folder cannot be made"; return; }
    if [ "$jobs" -gt 1 ]; then exec >"$at/output.txt" 2>&1 || { failed "$1" "no output.txt"; return; }; fi
    [ -z "$told" ] || return
    rm -f "$at/command.txt"
    eval "${commands[$1]} &"
    child=$!
    [ -z "$told" ] || kill -TERM $child 2>/dev/null                             # the signal came before there was a child
    wait $child
    status=$?
    while kill -0 $child 2>/dev/null; do wait $child; status=$?; done           # wait returns early on a signal
    if [ $status -ne 0 ]; then
        failed "$1" "status $status"
    elif [ -s "$at/result.json" ]; then     # a cell that was stopped has none, and status 0 too
        echo "${commands[$1]}" >"$at/command.txt"
    fi
}

todo=0
for i in "${!names[@]}"; do finished "$i" || todo=$((todo + 1)); done
side_by_side=$((todo < jobs ? todo : jobs))
if [ "$side_by_side" -gt 1 ]; then     # runs that fight for the same cores are far slower than turns
    cores=$("$PYTHON" -c "from fewshot.parallel import cores; print(cores())") || exit 1
    share=$((cores > side_by_side ? cores / side_by_side : 1))
    export FEWSHOT_CORES=$share OMP_NUM_THREADS="${OMP_NUM_THREADS:-$share}"    # tasks in threads; PyTorch's own threads
fi
for i in "${!names[@]}"; do
    if [ -n "$stopped" ]; then break; fi
    if finished "$i"; then continue; fi
    echo "[$((i + 1))/${#names[@]}] ${commands[$i]}"
    run "$i" &
    while [ -z "$stopped" ] && [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; do
        # In the background: Ctrl-C at a terminal would reach a sleep in the foreground, and nobody else.
        { sleep 0.2 & wait $!; } 2>/dev/null
    done
done
while [ -n "$(jobs -rp)" ]; do wait; done

if [ -n "$stopped" ]; then echo "stopped; $again continues"; exit 1; fi
for i in "${!names[@]}"; do     # --stop-after, or a signal to the cell itself
    if ! finished "$i" && ! grep -qF "${names[$i]} (" "$failures"; then failed "$i" "not at its end; $again continues"; fi
done
for shots in 1 5; do     # ModGrad's Figure 9, of the runs on Conv-4 that are there
    runs=() figure="$folder/modgrad/figure9/${shots}shot"
    for i in "${!names[@]}"; do
        case "${names[$i]}" in modgrad/table2/${shots}shot/*wrn*) ;; modgrad/table2/${shots}shot/*) if finished "$i"; then runs+=("$folder/${names[$i]}"); fi ;; esac
    done
    old=""
    for run in ${runs[@]+"${runs[@]}"}; do [ "$figure/gradients.json" -nt "$run/result.json" ] || old=1; done
    if [ ${#runs[@]} -gt 1 ] && [ -n "$old" ]; then
        "$PYTHON" -m tools.inspect_gradients "${runs[@]}" --gradient-noise 0.01 0.03 0.1 0.3 1 --spectrum --out "$figure" \
            ${places[@]+"${places[@]}"} || echo "${figure#"$folder/"} (status $?)" >>"$failures"
    fi
done
"$PYTHON" -m tools.tables "$folder" --out "$([ "$folder" = runs ] && echo results || echo "$folder")"
status=$?
if [ -s "$failures" ]; then
    echo "cells that failed or are not finished, which $again tries again:"
    sort "$failures"
    exit 1
fi
exit $status
