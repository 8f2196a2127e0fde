//! Quire: see the library of the same name.

fn main() -> std::process::ExitCode {
    quire::main()
}
