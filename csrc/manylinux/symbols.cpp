// Linked with PYDEQ_MANYLINUX only: defines what this machine's headers refer to and what glibc 2.28 or the libstdc++ of
// GCC 8 lack, so that a binary runs with both. All of it uses only what they have, and is hidden in its library.
#include <unwind.h>

#include <exception>
#include <new>
#include <sstream>

// glibc 2.32: whether the process has only one thread, so that a shared_ptr may count without atomic operations. "No"
// is always a right answer.
extern "C" {
char __libc_single_threaded = 0;
}
asm(".hidden __libc_single_threaded");

#if defined(__GLIBCXX__)

// GLIBCXX_3.4.26: the constructors without arguments, inline in earlier headers.
template std::basic_stringstream<char>::basic_stringstream();
template std::basic_ostringstream<char>::basic_ostringstream();
asm(".hidden _ZNSt7__cxx1118basic_stringstreamIcSt11char_traitsIcESaIcEEC1Ev");
asm(".hidden _ZNSt7__cxx1119basic_ostringstreamIcSt11char_traitsIcESaIcEEC1Ev");

// GLIBCXX_3.4.29
void std::__throw_bad_array_new_length() { throw std::bad_array_new_length(); }
asm(".hidden _ZSt28__throw_bad_array_new_lengthv");

// CXXABI_1.3.13: how an exception_ptr counts. Its constructor from a thrown object adds a reference. Deleting the
// exception drops one, and destroys the object with the last one; its header is right before it (Itanium C++ ABI).
void std::__exception_ptr::exception_ptr::_M_addref() noexcept {
  alignas(exception_ptr) unsigned char never_destroyed[sizeof(exception_ptr)];
  new (never_destroyed) exception_ptr(_M_exception_object);
}
void std::__exception_ptr::exception_ptr::_M_release() noexcept {
  _Unwind_DeleteException(static_cast<_Unwind_Exception*>(_M_exception_object) - 1);
}
asm(".hidden _ZNSt15__exception_ptr13exception_ptr9_M_addrefEv");
asm(".hidden _ZNSt15__exception_ptr13exception_ptr10_M_releaseEv");

#endif
