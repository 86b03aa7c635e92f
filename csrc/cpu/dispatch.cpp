// The run-time choice of vector width.
#include "rows.h"

namespace flexmore::rows {
namespace {

const Table& widest() {
#if defined(FM_X86_TABLES)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        return table_avx512;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return table_avx2;
#endif
    return table_baseline;
}

}  // namespace

const Table& table() {
    static const Table& chosen = widest();
    return chosen;
}

}  // namespace flexmore::rows
