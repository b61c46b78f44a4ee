// The CPU kernels for any CPU.
#include "portable.h"
#include "tables.h"

namespace fused_dropout {

extern const CpuKernels kPortableKernels = make_kernels("portable");

}  // namespace fused_dropout
