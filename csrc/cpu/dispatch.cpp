// The run-time choice of vector width.
#include <atomic>
#include <cstring>

#include "rows.h"

namespace flexmore::rows {
namespace {

bool runs_here(const Table& table) {
    if (&table == &table_baseline) return true;
#if defined(FM_X86_TABLES)
    __builtin_cpu_init();
    if (&table == &table_avx2) {
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    }
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("fma");
#else
    return false;
#endif
}

// The compiled Tables, the widest first.
constexpr const Table* kTables[] = {
#if defined(FM_X86_TABLES)
    &table_avx512,
    &table_avx2,
#endif
    &table_baseline,
};

const Table* widest() {
    for (const Table* table : kTables) {
        if (runs_here(*table)) return table;
    }
    return &table_baseline;
}

std::atomic<const Table*>& current() {
    static std::atomic<const Table*> table{widest()};
    return table;
}

}  // namespace

const Table& table() { return *current().load(std::memory_order_relaxed); }

bool use(const char* name) {
    for (const Table* table : kTables) {
        if (std::strcmp(table->name, name) == 0 && runs_here(*table)) {
            current().store(table, std::memory_order_relaxed);
            return true;
        }
    }
    return false;
}

}  // namespace flexmore::rows
