//! An ordinary user: the one who runs the tests, or `nobody` where that is root.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::short_tempdir;

/// A directory of that user, with a copy of the program: the tree may be one that only root can
/// read.
#[derive(Debug)]
pub(crate) struct User {
    dir: tempfile::TempDir,
    is_nobody: bool,
}

pub(crate) fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("our file");
}

impl User {
    pub(crate) fn new() -> User {
        let dir = short_tempdir();
        set_mode(dir.path(), 0o777);
        let user = User {
            dir,
            is_nobody: rustix::process::geteuid().is_root(),
        };
        user.install(Path::new(env!("CARGO_BIN_EXE_pollux")), "pollux");
        user
    }

    /// The directory.
    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Copies a program to a place in the directory.
    pub(crate) fn install(&self, program: &Path, place: &str) -> PathBuf {
        let to = self.dir.path().join(place);
        fs::copy(program, &to).expect("a copy");
        set_mode(&to, 0o755);
        to
    }

    /// The group that lets this user use a daemon's API, where it is not the daemon's own user.
    pub(crate) fn api_group(&self) -> Vec<String> {
        match self.is_nobody {
            true => vec!["--api-group".to_string(), "nogroup".to_string()],
            false => Vec::new(),
        }
    }

    /// A program of this user, by its path or of the search path; ours is in that, too.
    pub(crate) fn command(&self, program: &str) -> Command {
        let mut command = match self.is_nobody {
            true => {
                let mut command = Command::new("setpriv");
                command.args([
                    "--reuid=nobody",
                    "--regid=nogroup",
                    "--clear-groups",
                    program,
                ]);
                command
            }
            false => Command::new(program),
        };
        let path = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{}:{path}", self.dir.path().display()));
        command.env("HOME", self.dir.path());
        command
    }
}
