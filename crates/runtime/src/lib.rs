//! The only I/O of the product: disk engines, reactor, sockets, clock.
