//! The binary: one program, the roles that its configuration names.
//!
//! - [`config`]: the file, read with every mistake named by its line.
//! - [`run`]: starts control and proxy in one process and connects them.
//! - [`node`]: one of several nodes of which one is control.
//! - [`api`]: HTTP for people and scripts; [`cli`]: the command line, which speaks to it.
//! - [`demo`]: a whole installation on this machine, to watch.

#![forbid(unsafe_code)]

mod api;
mod cli;
mod config;
mod demo;
mod loaded;
mod node;
mod remote;
mod run;

fn main() -> std::process::ExitCode {
    cli::main()
}
