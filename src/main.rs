//! The `millstream` binary.

fn main() -> std::process::ExitCode {
    millstream::cli::main()
}
