//! Problems of the Rust half as exceptions of `pureflash.errors`.

use node::ClientProblem;
use proto::Status;
use pyo3::prelude::*;
use pyo3::types::PyDict;

/// The exception for a status: the class of its band, with this message.
pub fn raise(status: Status, message: &str) -> PyErr {
    raise_with_step(status, message, None)
}

/// The same, with what to do next where the code's own step would mislead.
pub fn raise_with_step(status: Status, message: &str, next_step: Option<&str>) -> PyErr {
    Python::attach(|py| {
        let made = py.import("pureflash.errors").and_then(|module| {
            let named = PyDict::new(py);
            named.set_item("next_step", next_step)?;
            module.call_method("from_code", (status as u32, message), Some(&named))
        });
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
