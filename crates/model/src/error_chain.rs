//! An error and its causes in one line, for logs, reasons and people. Each error tells its own layer only, so whoever
//! consumes it prints the chain once.

use std::error::Error;

pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
