//! The `millstream` binary.

/// Arrow's buffers are large and go from thread to thread; glibc keeps what they leave behind per arena
/// (`benches/README.md`, *Soak*).
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    millstream::cli::main()
}
