"""A machine that runs compiled Triton kernels on the CPU: their PTX, every thread of it.

Triton's own interpreter runs the source of a kernel, one operation of a whole program after another. It knows no
threads, and nothing of what the compiler makes of them. Here the compiler's work is run as it is written for a GPU,
and what compute-sanitizer would say there is an error: a place outside of every tensor, an access that is not
aligned, a thread that does not wait for what another writes, shared memory that nobody has written (it holds NaN).

``pytest --ptx`` runs the suites of the kernels on it, slowly. It shows nothing of time, of the assembler, and of
what goes on beside the threads: copies are there when they are waited for, products of matrices at once.

    text          reads PTX
    numbers       arithmetic that NumPy has not: bfloat16, TF32, bit fields, approximations
    instructions  what each instruction does, as Python
    memory        what may be touched, and who touched it last
    matrices      products of small matrices, spread over threads
    machine       threads and launches
    driver        the machine in the place of a GPU's driver
"""
