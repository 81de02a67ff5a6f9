"""C++ kernels for CPUs, for operations that XLA's compiler does slowly while a model decodes.

They compute sums of look-ups in small tables, products with chosen rows and with rows of 8 bits,
and the indices of the largest entries. XLA calls them through ``jax.ffi``. They are optional:
`logitjax.ops` and `logitjax.vq` return the same results without them, and use them where they are
built and a program has one device, a CPU ::

    python -m logitjax.kernels

builds them with the machine's C++ compiler (``CXX``, else c++, g++ or clang++) into the user's
cache. With ``LOGITJAX_NATIVE=0`` they are not used, e.g. for ``jax.export``. With
``LOGITJAX_NATIVE=1`` they are used with several devices too; each device then gets all rows of
their arguments.

A checksum is stored with the library. A truncated file is never loaded, and the command builds it
again. ``CXXFLAGS`` adds flags for the compiler, e.g. of a sanitizer; each set of flags has its own
library.
"""

# For `ops` and `vq`, which call the kernels.
from logitjax.kernels import _native as native  # noqa: F401
