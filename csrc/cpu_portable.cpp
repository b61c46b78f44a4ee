// The CPU kernels for any CPU.
#include "vector_portable.h"
#include "vector_kernels.h"

namespace fused_dropout {

extern const CpuKernels kPortableKernels = make_kernels("portable");

}  // namespace fused_dropout
