//! Problems of the Rust half as exceptions of `pureflash.errors`.

use node::ClientProblem;
use proto::Status;
use pyo3::prelude::*;

/// The exception for a status: the class of its band, with this message.
pub fn raise(status: Status, message: &str) -> PyErr {
    Python::attach(|py| {
        let made = py
            .import("pureflash.errors")
            .and_then(|module| module.call_method1("from_code", (status as u32, message)));
        match made {
            Ok(error) => PyErr::from_value(error),
            // The package is broken (its own module is missing): say that instead.
            Err(broken) => broken,
        }
    })
}

/// The exception for a problem of the client side.
pub fn client(problem: &ClientProblem) -> PyErr {
    raise(problem.status(), &problem.to_string())
}
