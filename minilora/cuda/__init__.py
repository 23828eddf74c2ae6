"""What a GPU does in its own way: kernels in CUDA C++, and matrix products by cuBLAS.

`kernels.cu` has the kernels, `launching.py` compiles and launches them, and `operations.py` puts
them in the place of the bodies that NumPy runs: `Backend.run` chooses. `blas.py` is behind
`Backend.matmul` and `Backend.add_matmul`.
"""
