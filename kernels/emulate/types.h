// CUDA's built-in vector types, for the host.
#pragma once

#include <cstdint>

#define QUIRE_VECTOR_TYPES(T, name, size)                          \
    struct name##1 { T x; };                                       \
    struct alignas(2 * size) name##2 { T x, y; };                  \
    struct name##3 { T x, y, z; };                                 \
    struct alignas(4 * size > 16 ? 16 : 4 * size) name##4 { T x, y, z, w; }; \
    inline name##1 make_##name##1(T x) { return {x}; }             \
    inline name##2 make_##name##2(T x, T y) { return {x, y}; }     \
    inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; } \
    inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }

QUIRE_VECTOR_TYPES(signed char, char, 1)
QUIRE_VECTOR_TYPES(unsigned char, uchar, 1)
QUIRE_VECTOR_TYPES(short, short, 2)
QUIRE_VECTOR_TYPES(unsigned short, ushort, 2)
QUIRE_VECTOR_TYPES(int, int, 4)
QUIRE_VECTOR_TYPES(unsigned int, uint, 4)
QUIRE_VECTOR_TYPES(float, float, 4)
QUIRE_VECTOR_TYPES(long long, longlong, 8)
QUIRE_VECTOR_TYPES(unsigned long long, ulonglong, 8)
QUIRE_VECTOR_TYPES(double, double, 8)
#undef QUIRE_VECTOR_TYPES

struct dim3 {
    unsigned int x = 1, y = 1, z = 1;
    dim3(unsigned int x = 1, unsigned int y = 1, unsigned int z = 1) : x(x), y(y), z(z) {}
    dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};
