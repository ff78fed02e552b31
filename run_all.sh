#!/usr/bin/env bash
# Every table of the papers, one command a cell. A cell is named paper/setting/shots/method, and its run lives in a folder of
# that name. Finished cells are skipped, broken ones continue, a failed one does not stop the others; tables.py comes last.
usage="usage: bash run_all.sh [--dry-run] [--only GLOB]... [--quick] [--synthetic] [--jobs N] [--out FOLDER] [-- FLAG...]

  --dry-run    print the commands, one a line, each complete in itself, and run nothing
  --only GLOB  only the cells whose name matches, as 'kml/2mode/5shot/*'; may be given several times
  --quick      the scripts' two-minute budget in place of the papers'
  --synthetic  procedural images in place of the real ones: no download
  --jobs N     N cells at a time (1); each one's output goes to output.txt in its folder
  --out FOLDER where the runs go (runs; with --quick runs/quick, with --synthetic runs/synthetic, ...)
  -- FLAG...   flags for every command, which win: -- --image-size 28 --iterations 4000; give another --out with them

Ctrl-C ends the running cells with a checkpoint; the same command continues. Python is that of .venv, if there is one, or of
the variable PYTHON. Status 1: a cell failed or is not finished; it is named at the end."
set -u
cd "$(dirname "$0")" || exit 1

fail() { echo "error: $1" >&2; exit 2; }

only=() places=() jobs=1 dry="" quick="" synthetic="" out="" extra=""
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
            while [ $# -gt 1 ]; do case "$1" in --data-root | --cache-dir) places+=("$1" "$2") ;; esac; shift; done
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

# ---------------------------------------------------------------------------------------------------------- the cells
names=() commands=()

cell() {    # cell NAME BUDGET COMMAND...    BUDGET: flags that are left out with --quick
    local name=$1 budget=${2:+ $2} glob
    shift 2
    if [ ${#only[@]} -gt 0 ]; then
        for glob in "${only[@]}"; do
            # shellcheck disable=SC2254 # a glob is meant
            case "$name" in $glob) glob=""; break ;; esac
        done
        [ -z "$glob" ] || return 0
    fi
    names+=("$name")
    commands+=("$python $*${quick:-$budget}$synthetic$extra --out $(printf %q "$folder/$name")")
}

# KML, Tables 1 and 2. (The scripts' defaults are the papers' settings.)
kml_methods() {     # kml_methods SETTING MODE...
    local setting=$1 shots
    shift
    for shots in 1 5; do
        local to="--modes $* --shots $shots" at="kml/$setting/${shots}shot"
        cell "$at/maml" "" mmaml.py "$to" --modulation none
        cell "$at/mmaml" "" mmaml.py "$to"
        cell "$at/mmaml+kml" "" kml.py "$to"
        cell "$at/protonet" "" mprotonet.py "$to" --modulation none
        cell "$at/mprotonet" "" mprotonet.py "$to" --modulation film
        cell "$at/mprotonet+kml" "" mprotonet.py "$to"
    done
}
kml_methods 2mode-dagger miniimagenet fc100
kml_methods 2mode omniglot miniimagenet
kml_methods 3mode omniglot miniimagenet fc100
kml_methods 5mode omniglot miniimagenet fc100 cub aircraft

# Multi-MAML and Multi-ProtoNet are one run a mode; every setting above uses the same ones. Multi-MAML's settings are those of
# MMAML's released code. Beside them, KML on one mode: what it does where there is no other mode to tell apart.
for mode in omniglot miniimagenet fc100 cub aircraft; do
    inner="--inner-lr 0.01 --inner-steps 5" budget="--meta-batch 4 --iterations 80000"
    if [ $mode = omniglot ]; then inner="--inner-lr 0.4 --inner-steps 1" budget="--meta-batch 10 --iterations 60000"; fi
    for shots in 1 5; do
        to="--modes $mode --shots $shots" at="kml/$mode/${shots}shot"
        cell "$at/multi-maml" "$budget" mmaml.py "$to" --modulation none "$inner"
        cell "$at/multi-protonet" "" mprotonet.py "$to" --modulation none
        cell "$at/mmaml+kml" "" kml.py "$to"
        cell "$at/mprotonet+kml" "" mprotonet.py "$to"
    done
done

# ModGrad, Conv-4 on mini-ImageNet: Table 2 and, of the same runs, Figure 9 (see the end); MAML on ModGrad's two layers with its
# step is the control that the paper lacks. Then the deep network of Table 2, Table 4 (a model for each number of steps), Table 5
# (columns u), and Figure 6 (first-order MAML of 5 to 30 steps, more shots, ResNet-34 at 224 pixels over twice as many episodes; the
# archives of mini-ImageNet that data.py takes hold 84 pixels, which are enlarged).
for shots in 1 5; do
    to="--modes miniimagenet --shots $shots"
    for algorithm in modgrad maml metasgd cavia tnet; do
        cell "modgrad/table2/${shots}shot/$algorithm" "" modgrad.py "$to" --algorithm $algorithm
    done
    cell "modgrad/table2/${shots}shot/maml-same-layers" "" modgrad.py "$to" --algorithm maml --adapt conv3 conv4 --steps 1 --alpha 0.1
    cell "modgrad/table2/${shots}shot/modgrad-wrn28-10" "" modgrad.py "$to" --backbone wrn28-10 --augment --keep-every 4000
    for steps in 2 3 4 5; do cell "modgrad/table4/${shots}shot/modgrad-${steps}steps" "" modgrad.py "$to" --steps $steps; done
    for rank in 1 10; do cell "modgrad/table5/${shots}shot/modgrad-u$rank" "" modgrad.py "$to" --rank $rank; done
done
for steps in 5 10 20 30; do
    maml="--algorithm maml --first-order --steps $steps" deep="--backbone resnet34 --augment --keep-every 8000"
    for shots in 5 10 15 20; do
        to="--modes miniimagenet --shots $shots"
        cell "modgrad/figure6/${shots}shot/maml-${steps}steps" "" modgrad.py "$to" "$maml"
        if [ $steps = 5 ] && [ $shots != 5 ]; then cell "modgrad/figure6/${shots}shot/modgrad" "" modgrad.py "$to"; fi
    done
    for shots in 1 5; do
        to="--modes miniimagenet --shots $shots" budget="--image-size 224 --iterations 33333"
        cell "modgrad/figure6/${shots}shot/maml-resnet34-${steps}steps" "$budget" modgrad.py "$to" "$maml" "$deep"
        if [ $steps = 5 ]; then cell "modgrad/figure6/${shots}shot/modgrad-resnet34" "$budget" modgrad.py "$to" "$deep"; fi
    done
done

# ModGrad, Table 3: faces completed from some of their pixels. (Figure 7 is a picture of these runs: see README.) MAML with ModGrad's
# step on the layer that ModGrad adapts is the control that the paper lacks.
for order in random ordered; do
    for pixels in 10 100; do
        for algorithm in cnp maml cavia modgrad; do
            cell "modgrad/table3/$order-$pixels/$algorithm" "" modgrad_completion.py --algorithm $algorithm --pixels $pixels --order $order
        done
        cell "modgrad/table3/$order-$pixels/maml-same-layer" "" modgrad_completion.py --algorithm maml --adapt fc5 --steps 1 \
            --pixels $pixels --order $order
    done
done

# ModGrad, Figure 5: alphabets of Omniglot, 100 steps each in testing, whatever the steps in training.
for algorithm in modgrad maml fomaml reptile; do
    cell "modgrad/figure5/$algorithm" "" modgrad_multishot.py --algorithm $algorithm
done

# ModGrad, Figure 8: reinforcement learning, navigation with two seeds. (The half-cheetahs need gymnasium[mujoco]. There are no
# images here, so --synthetic does not concern these cells.)
for env in navigation cheetah-dir cheetah-vel; do
    for algorithm in maml cavia modgrad; do
        rl="modgrad_rl.py --env $env --algorithm $algorithm"
        synthetic="" cell "modgrad/figure8/$env/$algorithm" "" "$rl"
        if [ $env = navigation ]; then synthetic="" cell "modgrad/figure8/$env/$algorithm-seed1" "" "$rl" --seed 1; fi
    done
done

# Attentive feature reuse, Table 2: mini-ImageNet, and the transfer to classes of another data set (mini-Places in the paper).
for shots in 1 5; do
    to="--modes miniimagenet --shots $shots --transfer fc100" at="afr/table2/${shots}shot"
    cell "$at/maml" "" afr.py "$to" --algorithm maml
    cell "$at/anil" "" afr.py "$to" --modulation none
    cell "$at/am" "" afr.py "$to" --modulation am
    cell "$at/am-constant" "" afr.py "$to" --modulation am --embed constant
    cell "$at/p-am" "" afr.py "$to" --modulation pam
done

# Its Table 1 and, of the same runs, Figure 5 (tables.py): one high-level task alone, and all four. On ray-cast scenes, NOT the paper's
# MMT data, which were never released; 5 shots are our choice.
for filters in 32 64; do
    to="--modes scenes --shots 5 --filters $filters --val-every 1000" at="afr/table1/${filters}filters"
    for modulation in none am; do
        for task in classification depth normals vanishing; do
            cell "$at/$task-$modulation" "" afr.py --tasks $task "$to" --modulation $modulation
        done
        cell "$at/multi-$modulation" "" afr.py --tasks classification depth normals vanishing "$to" --modulation $modulation
    done
done

# ---------------------------------------------------------------------------------------------------------- running them
[ ${#names[@]} -gt 0 ] || fail "no cell is named like --only ${only[*]}; --dry-run alone lists all"

finished() {    # of cell $1: it ended with this very command, and its result is of the latest checkpoint
    local at="$folder/${names[$1]}"
    [ "$(cat "$at/command.txt" 2>/dev/null)" = "${commands[$1]}" ] && [ -e "$at/result.json" ] &&
        ! [ "$at/checkpoint.pt" -nt "$at/result.json" ]
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

run() {     # cell $1, in the background
    local at="$folder/${names[$1]}" child="" status other
    trap 'kill -TERM $child 2>/dev/null' INT TERM HUP
    mkdir -p "$at" || { failed "$1" "its folder cannot be made"; return; }
    other=$(cat "$at/running.pid" 2>/dev/null)
    if [ -n "$other" ] && kill -0 "$other" 2>/dev/null; then failed "$1" "process $other is at it"; return; fi
    if [ "$jobs" -gt 1 ]; then exec >"$at/output.txt" 2>&1 || { failed "$1" "no output.txt"; return; }; fi
    eval "${commands[$1]} &"
    child=$!
    echo $child >"$at/running.pid"
    wait $child
    status=$?
    while kill -0 $child 2>/dev/null; do wait $child; status=$?; done           # wait returns early on a signal
    rm -f "$at/running.pid"
    if [ $status -ne 0 ]; then failed "$1" "status $status"; else echo "${commands[$1]}" >"$at/command.txt"; fi
}

if [ "$jobs" -gt 1 ] && [ -z "${OMP_NUM_THREADS:-}" ]; then     # runs that fight for the same cores are far slower than turns
    cores=$(nproc 2>/dev/null || sysctl -n hw.ncpu)
    export OMP_NUM_THREADS=$((cores > jobs ? cores / jobs : 1))
fi
for i in "${!names[@]}"; do
    if [ -n "$stopped" ]; then break; fi
    if finished "$i"; then continue; fi
    echo "[$((i + 1))/${#names[@]}] ${commands[$i]}"
    run "$i" &
    while [ -z "$stopped" ] && [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; do sleep 0.2; done
done
while [ -n "$(jobs -rp)" ]; do wait; done

if [ -n "$stopped" ]; then echo "stopped; the same command continues"; exit 1; fi
for i in "${!names[@]}"; do     # --stop-after, or a signal to the cell itself
    if ! finished "$i" && ! grep -qF "${names[$i]} (" "$failures"; then failed "$i" "not at its end; the same command continues"; fi
done
for shots in 1 5; do     # ModGrad's Figure 9, of the runs on Conv-4 that are there
    runs=() figure="$folder/modgrad/figure9/${shots}shot"
    for i in "${!names[@]}"; do
        case "${names[$i]}" in modgrad/table2/${shots}shot/*wrn*) ;; modgrad/table2/${shots}shot/*) if finished "$i"; then runs+=("$folder/${names[$i]}"); fi ;; esac
    done
    old=""
    for run in ${runs[@]+"${runs[@]}"}; do [ "$figure/gradients.json" -nt "$run/result.json" ] || old=1; done
    if [ ${#runs[@]} -gt 1 ] && [ -n "$old" ]; then
        "$PYTHON" inspect_gradients.py "${runs[@]}" --gradient-noise 0.01 0.03 0.1 0.3 1 --spectrum --out "$figure" \
            ${places[@]+"${places[@]}"} || echo "${figure#"$folder/"} (status $?)" >>"$failures"
    fi
done
"$PYTHON" tables.py "$folder" --out "$([ "$folder" = runs ] && echo results || echo "$folder")"
status=$?
if [ -s "$failures" ]; then
    echo "cells that failed or are not finished, which the same command tries again:"
    sort "$failures"
    exit 1
fi
exit $status
