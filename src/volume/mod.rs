//! Volumes: the head of a virtual disk.
pub mod index;
pub mod overlay;
pub mod segtab;
