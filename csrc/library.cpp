// The Python module `fused_dropout._C`, which fused_dropout/native.py imports. The import loads this library, whose
// static initialisers register the CPU kernels for the operators that fused_dropout/operators.py defines. The module
// has one attribute, `cpu_isa`: the instruction set of the kernels in use.
#include <Python.h>

#include "simd/kernels.h"
#include "version.h"

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", FUSED_DROPOUT_BUILT("_C"), 0, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module) PyModule_AddStringConstant(module, "cpu_isa", fused_dropout::cpu_kernels().isa);
  return module;
}
