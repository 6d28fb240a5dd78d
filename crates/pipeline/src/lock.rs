//! The right of one process to write somewhere: a file that is locked, not one that is there, so that a killed process
//! gives it back.

use std::fs::{File, TryLockError};
use std::io;
use std::path::Path;

/// A lock that is held; given back when dropped, and when the process ends, however it ends.
#[derive(Debug)]
pub struct FileLock {
    _file: File,
}

impl FileLock {
    /// Takes the lock of a file, which is made if it is not there; its directory must be. `None` if another process, or
    /// another place in this one, has it.
    ///
    /// # Errors
    ///
    /// If the file cannot be written, or its file system has no locks.
    pub fn try_acquire(path: &Path) -> io::Result<Option<Self>> {
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(path)?;
        match file.try_lock() {
            Ok(()) => Ok(Some(Self { _file: file })),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_holds_it_until_it_is_dropped() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join(".lock");
        let held = FileLock::try_acquire(&path).expect("writable");
        assert!(held.is_some());
        assert!(FileLock::try_acquire(&path).expect("writable").is_none());
        drop(held);
        assert!(FileLock::try_acquire(&path).expect("writable").is_some());
    }
}
