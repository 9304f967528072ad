// random_bytes.h - bytes from the operating system's generator.
#pragma once

#include <cstddef>
#include <span>

namespace sluice {

/// Fills `bytes`, at most 256 of them, so that no other process draws the same.
///
/// std::random_device is not used: linked statically, GNU's takes it from glibc 2.36 or later.
/// Throws: kInternal, which no system that has booted gives a reason for.
void draw_random(std::span<std::byte> bytes);

}  // namespace sluice
