// llama-batched-bench, with its last lines: its own main() leaves what the logger's thread has not yet written.

#include "log.h"

int llama_batched_bench(int argc, char ** argv);

int main(int argc, char ** argv) {
    const int result = llama_batched_bench(argc, argv);

    common_log_flush(common_log_main());

    return result;
}
