//! Errors of the Rust half as exceptions of `pureflash.errors`: the code decides the class.

use node::ClientProblem;
use pyo3::prelude::*;

/// The exception for a status number, with particulars.
pub fn error(code: u32, message: &str) -> PyErr {
    // What cannot be made into an exception of ours is one itself: the import's or the call's.
    Python::attach(|py| {
        let made = py
            .import("pureflash.errors")
            .and_then(|module| module.call_method1("from_code", (code, message)));
        made.map_or_else(|failure| failure, PyErr::from_value)
    })
}

/// The exception for a problem of the client side.
pub fn client(problem: &ClientProblem) -> PyErr {
    error(problem.status().number(), &problem.to_string())
}
