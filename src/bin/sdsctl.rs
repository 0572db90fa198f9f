//! The command line: see [`sds::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    sds::cli::main()
}
