// The kernels for any CPU: kPortableKernels, which cpu_kernels() in dropout_cpu.cpp returns if no better ones fit.
#include "portable.h"
#include "tables.h"

namespace fused_dropout {

extern const CpuKernels kPortableKernels = make_kernels("portable");

}  // namespace fused_dropout
