// The Python module: empty, since importing the library is what registers its ops.
#include <Python.h>

#pragma weak PyModule_Create2  // so that a program without Python can link or load the library for its ops

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
