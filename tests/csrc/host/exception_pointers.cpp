// Counts of std::exception_ptr as csrc/manylinux/symbols.cpp keeps them. Prints a line for each check that fails.
#include <cstdio>
#include <exception>
#include <stdexcept>
#include <vector>

namespace {

int failures = 0, alive = 0;

void check(bool holds, const char* what) {
  if (holds) return;
  ++failures;
  std::printf("%s\n", what);
}

struct Error : std::runtime_error {
  Error() : std::runtime_error("an error") { ++alive; }
  Error(const Error& other) : std::runtime_error(other) { ++alive; }
  ~Error() override { --alive; }
};

void share(std::exception_ptr first) {
  std::vector<std::exception_ptr> all(9, first);
  first = nullptr;
  check(alive == 1, "is destroyed while it is referred to, or copied");
  int caught = 0;
  for (const std::exception_ptr& one : all) {
    try {
      std::rethrow_exception(one);
    } catch (const Error&) {
      ++caught;
    }
  }
  check(caught == 9 && std::uncaught_exceptions() == 0, "is not caught as what it is");
  std::exception_ptr last = all[4];
  all.clear();
  check(alive == 1, "is destroyed before the last reference");
  last = nullptr;
}

}  // namespace

int main() {
  std::exception_ptr thrown;
  try {
    throw Error();
  } catch (...) {
    thrown = std::current_exception();
  }
  std::exception_ptr handed = std::move(thrown);
  share(std::move(handed));
  check(alive == 0, "a thrown exception outlives its last reference");
  handed = std::make_exception_ptr(Error());
  share(std::move(handed));
  check(alive == 0, "a made exception outlives its last reference");
  return failures;
}
