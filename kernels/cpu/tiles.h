// AMX: products of tiles of 16 rows of 64 bytes, in eight registers of their own.
#pragma once

#include "simd.h"

#if defined(RTX_HAS_AMX)

namespace rtx {

// What was written before is in memory for tiles that are loaded behind: GCC does not know that they read it.
RTX_INLINE void settle() { __asm__ volatile("" ::: "memory"); }

// While it lives, its thread's registers are tiles. Their contents are lost when it ends.
class Tiles {
 public:
  RTX_AMX Tiles() {
    // Constant: GCC takes only the first bytes of it for read, and would leave out what is written to the others.
    alignas(64) static constexpr Configuration kWanted{
        1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    _tile_loadconfig(&kWanted);
  }
  RTX_AMX ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  struct Configuration {
    uint8_t palette, start_row, reserved[14];
    uint16_t columns[16];  // bytes
    uint8_t rows[16];
  };
};

}  // namespace rtx

#endif
