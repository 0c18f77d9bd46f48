"""A card in software: runs what Triton compiled for an NVIDIA GPU on CPU tensors, for tests.

Triton's interpreter runs a kernel's source. It says nothing of what the compiler makes of it, and
does not run inline assembly. Here the compiled program itself is run, the PTX of a real launch:
instruction by instruction, all programs of a grid side by side, each register an array with a
number for every thread.

    parse       PTX text -> statements in basic blocks
    computing   instructions that compute on registers
    memory      device and shared memory, asynchronous copies
    matrices    instructions of a warp, or of four: shuffles, products, their operands
    counting    what a launch asks of memory
    machine     basic blocks -> Python functions, and running them
    card        compiles a launch as Triton would for a card, and runs it

Around it, ``torch.cuda``, for what is queued, waited for, captured and let go:

    timeline    streams, events, graphs: what is queued is done as late as they allow
    tensors     tensors that say they are on a card, and the memory that a card has
    runtime     torch's ops on them, copies, launches
    whole       the cuda backend on all of it, kernels compiled or interpreted
    plugin      the same for pytest

What it finds that a card may hide: reads and writes outside of tensors, misaligned ones, reads of
asynchronous copies that nobody waited for (they have not arrived), shared memory that nobody wrote
(NaN). What it cannot find: threads that race between barriers, because all run in step; products of
four warps that nobody waited for, because they are done at once; what a card's own arithmetic
rounds differently (``ex2.approx``, and sums inside a product, which are exact here until they are
rounded once).
"""
