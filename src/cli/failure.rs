//! Why a command failed, and the exit codes for it.

use std::error::Error;
use std::fmt;
use std::io;

use super::text;
use crate::api::client::ClientError;
use crate::api::{ControlError, STOPPING, ServerError};
use crate::config::ConfigError;
use crate::log;

/// The command succeeded.
pub const EXIT_OK: u8 = 0;
/// Internal error of pollux or the operating system.
pub const EXIT_INTERNAL: u8 = 1;
/// Bad arguments.
pub const EXIT_BAD_ARGUMENTS: u8 = 2;
/// No daemon answers on the API socket.
pub const EXIT_NO_DAEMON: u8 = 3;
/// The port or entry does not exist.
pub const EXIT_NOT_FOUND: u8 = 4;
/// Refused: no permission, or a conflict with what exists.
pub const EXIT_REFUSED: u8 = 5;

/// Meanings of the exit codes, for `--help`, the man pages and `docs/operating.md` (a test
/// compares).
///
/// A code names the cause, not the command: `pollux run --port SPEC` fails with the code that
/// `pollux port add SPEC` has for the same port.
pub(super) const EXIT_CODES: [(u8, &str); 6] = [
    (EXIT_OK, "done; `run`: ended by SIGTERM or SIGINT"),
    (
        EXIT_INTERNAL,
        "internal error of pollux or the operating system",
    ),
    (
        EXIT_BAD_ARGUMENTS,
        "bad arguments, or a CPU that is not there",
    ),
    (
        EXIT_NO_DAEMON,
        "no daemon answers on the API socket, or it stopped meanwhile",
    ),
    (
        EXIT_NOT_FOUND,
        "no such port, address, poll thread, mirror or capture",
    ),
    (
        EXIT_REFUSED,
        "refused: no permission, or in conflict with what exists: a name or socket in use, \
         a file that is no socket, a missing directory or group, a limit",
    ),
];

/// Formats exit codes and their meanings for `--help`.
pub(super) fn exit_codes(codes: &[(u8, &str)]) -> String {
    let lines = codes.iter().map(|(code, meaning)| {
        let meaning = meaning.replace('`', "");
        text::wrap(&format!("  {code}  {meaning}"), 80, 5)
    });
    format!("Exit codes:\n{}", lines.collect::<Vec<_>>().join("\n"))
}

/// Why a command failed, with its exit code.
#[derive(Debug)]
pub struct Failure {
    code: u8,
    text: String,
    hint: Option<String>,
}

impl Failure {
    /// A failure with its exit code and one sentence.
    pub fn new(code: u8, text: impl Into<String>) -> Self {
        Failure {
            code,
            text: text.into(),
            hint: None,
        }
    }

    pub(super) fn internal(text: impl Into<String>) -> Self {
        Failure::new(EXIT_INTERNAL, text)
    }

    pub(super) fn bad_arguments(text: impl Into<String>) -> Self {
        Failure::new(EXIT_BAD_ARGUMENTS, text)
    }

    /// A file that cannot be written or created. `what` completes the sentence `cannot …`.
    pub(super) fn file(what: &str, error: &io::Error) -> Self {
        Failure::new(code_of_io(error.kind()), format!("cannot {what}: {error}"))
    }

    /// The reader of our output has left. The command ends without a message and with success.
    pub(super) fn reader_left() -> Self {
        Failure::new(EXIT_OK, "")
    }

    /// Returns the exit code.
    pub fn code(&self) -> u8 {
        self.code
    }

    pub(super) fn from_runner(error: Box<dyn Error>) -> Self {
        match error.downcast::<Failure>() {
            Ok(failure) => *failure,
            Err(error) => Failure::new(code_of(&*error), chain(&*error)),
        }
    }

    pub(super) fn report(&self) {
        if self.text.is_empty() {
            return;
        }
        let width = text::columns(&io::stderr());
        let lines = |text: &str, hang| text::fit(&text::escape(text), width, hang);
        let mut message = format!("{}\n", lines(&format!("pollux: {}", self.text), 2));
        if let Some(hint) = &self.hint {
            message.push_str(&format!("{}\n", lines(&format!("  {hint}"), 2)));
        }
        // Through the log if it runs, so that the last message of a daemon does not block either.
        if !log::say(&message) {
            text::note(&message);
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Error for Failure {}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        Failure {
            code: client_code(&error),
            text: chain(&error),
            hint: match error {
                ClientError::Refused { error, .. } => error.hint,
                _ => None,
            },
        }
    }
}

fn client_code(error: &ClientError) -> u8 {
    match error {
        ClientError::NoDaemon { .. }
        | ClientError::Silent { .. }
        | ClientError::NotPollux { .. }
        | ClientError::HungUp { .. }
        | ClientError::OtherVersion { .. }
        | ClientError::Cut { .. } => EXIT_NO_DAEMON,
        ClientError::Denied { .. } => EXIT_REFUSED,
        ClientError::BadPath { .. } => EXIT_BAD_ARGUMENTS,
        ClientError::Io { .. } => EXIT_INTERNAL,
        ClientError::Refused { error, .. } if error.code == STOPPING => EXIT_NO_DAEMON,
        ClientError::Refused { status, .. } => match status {
            400 | 405 | 408 | 413 => EXIT_BAD_ARGUMENTS,
            404 | 410 => EXIT_NOT_FOUND,
            403 | 409 | 503 => EXIT_REFUSED,
            _ => EXIT_INTERNAL,
        },
    }
}

/// Returns the exit code of an I/O error: refused if the file system refuses, else internal.
fn code_of_io(kind: io::ErrorKind) -> u8 {
    match kind {
        io::ErrorKind::PermissionDenied
        | io::ErrorKind::NotFound
        | io::ErrorKind::NotADirectory
        | io::ErrorKind::IsADirectory
        | io::ErrorKind::AlreadyExists
        | io::ErrorKind::AddrInUse
        | io::ErrorKind::ReadOnlyFilesystem => EXIT_REFUSED,
        _ => EXIT_INTERNAL,
    }
}

/// Returns the exit code of an error that kept the daemon from starting.
fn code_of(error: &(dyn Error + 'static)) -> u8 {
    let mut next = Some(error);
    while let Some(error) = next {
        if error.is::<ConfigError>() {
            return EXIT_BAD_ARGUMENTS;
        }
        match error.downcast_ref::<ControlError>() {
            Some(ControlError::BadArgument(_)) => return EXIT_BAD_ARGUMENTS,
            Some(ControlError::Conflict { .. }) => return EXIT_REFUSED,
            Some(ControlError::NotFound { .. } | ControlError::Gone { .. }) => {
                return EXIT_NOT_FOUND;
            }
            Some(ControlError::Stopping) => return EXIT_NO_DAEMON,
            Some(ControlError::Internal(_)) | None => {}
        }
        match error.downcast_ref::<ServerError>() {
            Some(ServerError::Path { .. }) => return EXIT_BAD_ARGUMENTS,
            Some(
                ServerError::Live { .. }
                | ServerError::InUse { .. }
                | ServerError::NotASocket { .. }
                | ServerError::NoDirectory { .. }
                | ServerError::Group(_),
            ) => return EXIT_REFUSED,
            Some(ServerError::Bind { source, .. }) => return code_of_io(source.kind()),
            _ => {}
        }
        next = error.source();
    }
    EXIT_INTERNAL
}

/// Formats an error and its causes on one line.
fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        text.push_str(": ");
        text.push_str(&error.to_string());
        next = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::types::ApiError;

    #[test]
    fn each_refusal_has_its_exit_code() {
        for (status, code) in [
            (400, EXIT_BAD_ARGUMENTS),
            (404, EXIT_NOT_FOUND),
            (410, EXIT_NOT_FOUND),
            (409, EXIT_REFUSED),
            (503, EXIT_REFUSED),
            (500, EXIT_INTERNAL),
        ] {
            let error = ApiError {
                code: "x".into(),
                message: "y".into(),
                hint: None,
            };
            let failure = Failure::from(ClientError::Refused { status, error });
            assert_eq!(failure.code(), code, "{status}");
        }
    }

    #[test]
    fn a_daemon_that_cannot_start_says_why_with_its_code() {
        let live = ServerError::Live { path: "/x".into() };
        let failure = Failure::from_runner(Box::new(live));
        assert_eq!(failure.code(), EXIT_REFUSED);
        assert!(failure.to_string().contains("another pollux answers on"));
        let own = Failure::from_runner(Box::new(Failure::new(EXIT_NOT_FOUND, "gone")));
        assert_eq!(own.code(), EXIT_NOT_FOUND);
    }

    #[test]
    fn a_full_disk_is_the_systems_fault_and_a_missing_directory_is_not() {
        let full = io::Error::from(io::ErrorKind::StorageFull);
        assert_eq!(Failure::file("write", &full).code(), EXIT_INTERNAL);
        let missing = io::Error::from(io::ErrorKind::NotFound);
        assert_eq!(Failure::file("write", &missing).code(), EXIT_REFUSED);
    }
}
