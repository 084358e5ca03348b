// The Python modules `_C` and `_C_cuda`: empty, since importing a library is what registers its ops.
#include <Python.h>

#pragma weak PyModule_Create2  // so that a program without Python can link or load the library for its ops

#ifndef LIBRARY
#define LIBRARY _C
#endif
#define JOIN(a, b) a##b
#define INIT(name) JOIN(PyInit_, name)
#define TEXT(name) #name
#define QUOTED(name) TEXT(name)

PyMODINIT_FUNC INIT(LIBRARY)(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, QUOTED(LIBRARY), nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
