//! Memory and time before anything is loaded.
