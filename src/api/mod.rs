//! How a running Pollux is operated: plain values, a trait, and HTTP/JSON on a unix socket.
//!
//! - [`types`]: what travels, with stable snake_case names in base units (bytes, seconds).
//! - [`Control`]: what the daemon must answer. The server calls it; tests put a model behind it.
//! - [`events`]: the bounded fan-out of what happens, which never waits for a reader.
//! - [`server`]: HTTP on a thread of its own, with limits on size, time and connections.
//! - [`client`]: the blocking client that the commands use.
//! - [`openapi`]: the description generated from the types and the routes.
//!
//! Nothing here touches the data path: the API thread reads what control gives it, and a stuck or
//! hostile client can use up its own connection and no more.

pub mod client;
pub mod events;
pub mod openapi;
pub mod server;
pub mod types;

mod conn;
mod control;
mod failure;
mod routes;
mod socket;
mod stream;

pub use control::{ByteStream, Control, ControlError, What};
pub use events::EventHub;
pub(crate) use failure::STOPPING;
pub use server::{Server, ServerError};
pub use socket::default_socket;
