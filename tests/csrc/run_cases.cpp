// Runs cases in the emulator: run_cases CASES RESULTS.
//
// CASES holds, for each case, lines of text and then bytes:
//   case NAME
//   integer KEY VALUE / number KEY VALUE (hexadecimal) / buffer KEY BYTES OFFSET, in any number
//   data, followed by the bytes of all buffers in order
// RESULTS gets the bytes of all buffers of all cases, each case followed by five int64: bytes loaded, bytes stored,
// launches, the most shared memory that a block of them had, the most blocks of a cluster.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <memory>
#include <sstream>

#include "emulator/emulator.h"
#include "run_case.h"

namespace pydeq {

Buffer::Buffer(int64_t bytes, int64_t offset)
    : memory_(std::malloc(static_cast<size_t>(bytes + offset))),
      data_(static_cast<unsigned char*>(memory_) + offset),
      bytes_(bytes) {}
Buffer::~Buffer() { std::free(memory_); }

int64_t Case::integer(const std::string& key) const {
  const auto found = integers.find(key);
  if (found == integers.end()) emulator::fail("case %s lacks %s", name.c_str(), key.c_str());
  return found->second;
}

double Case::number(const std::string& key) const {
  const auto found = numbers.find(key);
  if (found == numbers.end()) emulator::fail("case %s lacks %s", name.c_str(), key.c_str());
  return found->second;
}

void* Case::pointer(const std::string& key) const {
  const auto found = buffers.find(key);
  return found == buffers.end() || found->second->bytes() == 0 ? nullptr : found->second->data();
}

StepArgs Case::step_args() const {
  return {integer("batch"),
          integer("state"),
          dtype(),
          pointer("z"),
          pointer("f"),
          pointer("next"),
          pointer("best"),
          static_cast<double*>(pointer("scalars")),
          static_cast<int32_t*>(pointer("counters")),
          static_cast<int64_t*>(pointer("progress")),
          integer("step"),
          {number("rtol"), number("atol"), number("eps"), integer("freeze") != 0, integer("stall") != 0,
           integer("last") != 0, integers.count("look_back") ? integer("look_back") : 0},
          {nullptr, 1}};
}

StepLimits Case::limits() const {
  return {integer("shared_bytes"),          integer("max_blocks"),   integer("block_state"),
          integer("cluster_blocks"),        integer("tile_threads"), integer("multiprocessors"),
          static_cast<int>(integer("path"))};
}

namespace {

void run(const Case& test) {
  emulator::seed(static_cast<uint64_t>(test.integer("seed")));
  if (test.name == "squared_norm") return run_squared_norm(test);
  if (test.name == "random_probes") return run_random_probes(test);
  if (test.name == "picard_step") return run_picard_step(test);
  if (test.name == "anderson_step") return run_anderson_step(test);
  if (test.name == "broyden_step") return run_broyden_step(test);
  if (test.name == "gmres_step") return run_gmres_step(test);
  if (test.name == "step_shape") return run_step_shape(test);
  if (test.name == "specimen") return run_specimen(test);
  emulator::fail("unknown case %s", test.name.c_str());
}

int run_all(std::istream& in, std::ostream& out) {
  std::string line, word, key;
  Case test;
  std::vector<std::unique_ptr<Buffer>> owned;
  while (std::getline(in, line)) {
    std::istringstream words(line);
    words >> word;
    if (word == "case") {
      test = {};
      owned.clear();
      words >> test.name;
    } else if (word == "integer") {
      words >> key >> test.integers[key];
    } else if (word == "number") {
      std::string value;
      words >> key >> value;
      test.numbers[key] = std::strtod(value.c_str(), nullptr);
    } else if (word == "buffer") {
      int64_t bytes = 0, offset = 0;
      words >> key >> bytes >> offset;
      owned.push_back(std::make_unique<Buffer>(bytes, offset));
      test.order.push_back(key);
      test.buffers[key] = owned.back().get();
    } else if (word == "data") {
      for (const auto& buffer : owned) in.read(reinterpret_cast<char*>(buffer->data()), buffer->bytes());
      emulator::traffic = {};
      emulator::launches = {};
      run(test);
      for (const auto& buffer : owned) out.write(reinterpret_cast<const char*>(buffer->data()), buffer->bytes());
      const int64_t counts[5] = {emulator::traffic.loaded, emulator::traffic.stored, emulator::launches.count,
                                 emulator::launches.shared_bytes, emulator::launches.cluster};
      out.write(reinterpret_cast<const char*>(counts), sizeof counts);
    } else {
      emulator::fail("unknown line: %s", line.c_str());
    }
  }
  return 0;
}

}  // namespace
}  // namespace pydeq

int main(int, char** arguments) {
  std::ifstream in(arguments[1], std::ios::binary);
  std::ofstream out(arguments[2], std::ios::binary);
  const int code = pydeq::run_all(in, out);
  out.flush();
  return in.eof() && out ? code : 1;
}
