// A case that Python wrote: numbers by name and buffers, each in memory of its own.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "cuda/step_shape.h"
#include "shared/dispatch.h"
#include "shared/step_args.h"

namespace pydeq {

// Memory of exactly this size, `offset` bytes beyond an address that is aligned to 16 bytes.
class Buffer {
 public:
  Buffer(int64_t bytes, int64_t offset);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  unsigned char* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  void* memory_;
  unsigned char* data_;
  int64_t bytes_;
};

struct Case {
  std::string name;
  std::map<std::string, int64_t> integers;
  std::map<std::string, double> numbers;
  std::vector<std::string> order;  // of the buffers
  std::map<std::string, Buffer*> buffers;

  int64_t integer(const std::string& key) const;
  double number(const std::string& key) const;
  void* pointer(const std::string& key) const;  // null where there is no such buffer or it is empty
  Dtype dtype() const { return static_cast<Dtype>(integer("dtype")); }
  StepArgs step_args() const;
  StepLimits limits() const;
};

// Each runs one operation on the case's buffers, in place.
void run_squared_norm(const Case&);
void run_random_probes(const Case&);
void run_picard_step(const Case&);
void run_anderson_step(const Case&);
void run_broyden_step(const Case&);
void run_gmres_step(const Case&);
void run_step_shape(const Case&);
void run_specimen(const Case&);

}  // namespace pydeq
