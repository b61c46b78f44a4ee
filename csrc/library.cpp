// The module `fused_dropout._C`: importing it loads this library, whose static initialisers register the kernels for
// the operators that fused_dropout/operators.py defines. It has nothing to offer Python itself.
#include <Python.h>

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, 0, nullptr};
  return PyModule_Create(&module);
}
