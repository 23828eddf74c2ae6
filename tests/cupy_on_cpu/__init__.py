"""Real CuPy on a machine without a GPU: its own Python and Cython, on the host's memory.

    import cupy_on_cpu
    cupy_on_cpu.install()    # before cupy is imported
    import cupy

CuPy's wheel needs a GPU for three things. Each is replaced:

    libraries.py   CUDA's runtime, which is linked into CuPy: its functions become jumps to src/
    libraries.py   the driver and cuBLAS: src/ is compiled and loaded by their names
    kernels.py     NVRTC: kernels are compiled by g++ as C++

So the tests marked `gpu` run where CuPy, the headers of CUDA and g++ are installed. It shows which
call fails, what CuPy launches, copies and waits for, whether work can be captured as a graph, and
whether a kernel computes what it should. New memory is filled with NaN, the threads of a block
run in either order, and there are two devices, whose arrays do not mix. TF32 and bfloat16 products
round their operands, and a captured product needs a workspace of its own.

It does not show times, races, a real cuBLAS's last bits, or what several streams do. Missing
are FFT, cuSOLVER, cuRAND, cuSPARSE, NCCL, dynamic shared memory, cooperative groups and tensor
cores. CUPY_ON_CPU_CACHE names the folder for compiled files; with CUPY_ON_CPU_FLUSH=1 kernels take
subnormal numbers as 0, as CuPy has them compiled for a GPU.
"""

from .counting import Counts as Counts
from .counting import compute as compute
from .counting import counted as counted
from .counting import journal as journal
from .counting import nodes as nodes
from .importing import install as install
from .importing import is_installed as is_installed
from .packages import EmulationError as EmulationError
from .packages import why_not as why_not
