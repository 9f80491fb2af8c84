"""``sparsyfed bench gpu``: everything CUDA, proven and measured in the minutes at hand, by one command.

Three parts in this order, each with its share of the time: what must hold on a GPU (the checks of
``tests/cluster/clients/cuda_checks.py``); steps a second by model, method, precision and host processes, with
a table of kernels; the rest of the time on the paper's CIFAR-10 experiment beside its authors' own curves.
Each result is written at once to ``RUNS/gpu.json`` and ``RUNS/gpu.md``; the same command again goes on where
it ended. It needs a checkout and the packages of the slim inline path (docs/cluster.md), no Ray.

    sparsyfed bench gpu --minutes 10 --data FOLDER --resume RUNS
    sparsyfed bench gpu --minutes 3 --data FOLDER --resume RUNS --device cpu     # a rehearsal, all of it tiny
    sparsyfed bench gpu --draw RUNS/gpu.json                                     # the picture, on any machine
"""
