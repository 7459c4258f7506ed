// The functions that a library exports to ctypes; everything else in it is hidden.
#pragma once

#define PYDEQ_EXPORT extern "C" __attribute__((visibility("default")))
