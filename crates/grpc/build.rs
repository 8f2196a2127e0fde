//! Compiles `proto/` with protox, a protobuf compiler in Rust: no protoc needed.

use std::path::{Path, PathBuf};
use std::{env, fs};

use prost::Message;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let root = Path::new("../../proto");
    println!("cargo:rerun-if-changed={}", root.display());
    let descriptors = protox::compile(["quire/v1/inference.proto"], [root])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("quire.v1.descriptors.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure().build_client(true).compile_fds(descriptors)?;
    Ok(())
}
