// The tile instructions of AMX in plain C++, so that the code that uses them can be tested on any processor.

#ifndef DLRM_JAX_NATIVE_AMX_EMULATION_H_
#define DLRM_JAX_NATIVE_AMX_EMULATION_H_

#include <cstdint>
#include <cstring>

namespace amx_emulation {

struct Tiles {
  uint8_t bytes[8][16][64];
  uint16_t columns[8];
  uint8_t rows[8];
};
inline thread_local Tiles tiles;

inline float FromBits(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float out;
  std::memcpy(&out, &wide, sizeof out);
  return out;
}

inline void LoadConfig(const void* config) {
  std::memcpy(tiles.columns, static_cast<const uint8_t*>(config) + 16, sizeof tiles.columns);
  std::memcpy(tiles.rows, static_cast<const uint8_t*>(config) + 48, sizeof tiles.rows);
}

inline void Zero(int tile) { std::memset(tiles.bytes[tile], 0, sizeof tiles.bytes[tile]); }

inline void Load(int tile, const void* base, int64_t stride) {
  Zero(tile);
  for (int r = 0; r < tiles.rows[tile]; ++r) {
    std::memcpy(tiles.bytes[tile][r], static_cast<const uint8_t*>(base) + r * stride, tiles.columns[tile]);
  }
}

inline void StoreTile(int tile, void* base, int64_t stride) {
  for (int r = 0; r < tiles.rows[tile]; ++r) {
    std::memcpy(static_cast<uint8_t*>(base) + r * stride, tiles.bytes[tile][r], tiles.columns[tile]);
  }
}

// Intel's pseudocode of TDPBF16PS: c[m][n] += a[m][2k] * b[k][2n] + a[m][2k + 1] * b[k][2n + 1].
inline void DotProduct(int c, int a, int b) {
  for (int m = 0; m < tiles.rows[c]; ++m) {
    for (int k = 0; k < tiles.columns[a] / 4; ++k) {
      for (int n = 0; n < tiles.columns[c] / 4; ++n) {
        uint16_t left[2], right[2];
        std::memcpy(left, &tiles.bytes[a][m][4 * k], 4);
        std::memcpy(right, &tiles.bytes[b][k][4 * n], 4);
        float sum;
        std::memcpy(&sum, &tiles.bytes[c][m][4 * n], 4);
        sum += FromBits(left[0]) * FromBits(right[0]);
        sum += FromBits(left[1]) * FromBits(right[1]);
        std::memcpy(&tiles.bytes[c][m][4 * n], &sum, 4);
      }
    }
  }
}

}  // namespace amx_emulation

#define _tile_loadconfig(config) amx_emulation::LoadConfig(config)
#define _tile_release() std::memset(&amx_emulation::tiles, 0, sizeof amx_emulation::tiles)
#define _tile_zero(tile) amx_emulation::Zero(tile)
#define _tile_loadd(tile, base, stride) amx_emulation::Load(tile, base, stride)
#define _tile_stored(tile, base, stride) amx_emulation::StoreTile(tile, base, stride)
#define _tile_dpbf16ps(c, a, b) amx_emulation::DotProduct(c, a, b)

#endif  // DLRM_JAX_NATIVE_AMX_EMULATION_H_
