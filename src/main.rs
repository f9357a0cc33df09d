//! The `millstream` binary.

/// Arrow's buffers are large, short-lived and freed on other threads than those that made them. glibc keeps what they
/// leave behind per arena, which was five times what was in use (`benches/README.md`, *Soak*).
#[cfg(not(target_env = "msvc"))]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Read by jemalloc at start: freed pages go back to the system after a second, by a thread of its own.
#[cfg(not(target_env = "msvc"))]
#[expect(unsafe_code, non_upper_case_globals, reason = "the name by which jemalloc looks for its settings")]
#[unsafe(export_name = "malloc_conf")]
pub static malloc_conf: &[u8] = b"background_thread:true,dirty_decay_ms:1000,muzzy_decay_ms:0,narenas:8\0";

fn main() -> std::process::ExitCode {
    millstream::cli::main()
}
