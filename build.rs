//! Compiles `kernels/*.cu` for the feature `cuda`: one compressed fatbin per source, with machine code for each
//! architecture in [`ARCHITECTURES`] (or [`HOPPER`] alone) and PTX for those to come. Without the feature it does nothing.
//!
//! nvcc is `QUIRE_NVCC`, else `$CUDA_HOME/bin/nvcc`, else the one on `PATH`. `QUIRE_NVCC=skip` builds without images:
//! the program then says at start that it has none. See docs/cuda.md for nvcc by pip alone.

use std::error::Error;
use std::ffi::OsString;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::{env, fs};

/// What is compiled of a source whose name ends in `_sm90a`: instructions that only Hopper has.
const HOPPER: &[&str] = &["arch=compute_90a,code=sm_90a"];

/// `-gencode` values. The last keeps PTX, which a newer driver compiles at load for what is not listed.
const ARCHITECTURES: &[&str] = &[
    "arch=compute_80,code=sm_80",
    "arch=compute_89,code=sm_89",
    "arch=compute_90a,code=sm_90a",
    "arch=compute_100a,code=sm_100a",
    "arch=compute_80,code=compute_80",
];

const HINT: &str = "feature `cuda` needs nvcc 13: set QUIRE_NVCC to its path or CUDA_HOME to the toolkit, or install it \
                    with `pip install nvidia-cuda-nvcc==13.0.*` (docs/cuda.md); QUIRE_NVCC=skip builds without kernels";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return Ok(());
    }
    for variable in ["QUIRE_NVCC", "CUDA_HOME"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    println!("cargo::rerun-if-changed=kernels");
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?);
    let images = match env::var("QUIRE_NVCC").as_deref() {
        Ok("skip") => {
            println!("cargo::warning=QUIRE_NVCC=skip: this build has no CUDA kernels");
            Vec::new()
        }
        _ => compile(&find_nvcc()?, &out)?,
    };
    fs::write(out.join("cuda_images.rs"), table(&images)?)?;
    Ok(())
}

fn find_nvcc() -> Result<PathBuf, Box<dyn Error>> {
    let set = |variable: &str| env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from);
    let nvcc = match (set("QUIRE_NVCC"), set("CUDA_HOME")) {
        (Some(path), _) => path,
        (None, Some(home)) => home.join("bin/nvcc"),
        (None, None) => "nvcc".into(),
    };
    match Command::new(&nvcc).arg("--version").output() {
        Ok(output) if output.status.success() => Ok(nvcc),
        Ok(output) => Err(format!("{} --version: {}; {HINT}", nvcc.display(), output.status).into()),
        Err(error) => Err(format!("{}: {error}; {HINT}", nvcc.display()).into()),
    }
}

/// The fatbin of each source, in order of their names. As many compilers run at once as cargo gives jobs.
fn compile(nvcc: &Path, out: &Path) -> Result<Vec<PathBuf>, Box<dyn Error>> {
    let is_source = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "cu");
    let entries = fs::read_dir("kernels")?.map(|entry| entry.map(|entry| entry.path()));
    let mut sources: Vec<_> = entries.collect::<Result<Vec<_>, _>>()?.into_iter().filter(is_source).collect();
    sources.sort();
    let jobs = env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(1usize).max(1);
    let image = |source: &PathBuf| Some(out.join(source.file_stem()?).with_extension("fatbin"));
    let images: Vec<_> = sources.iter().filter_map(image).collect();
    let pairs: Vec<_> = sources.iter().zip(&images).collect();
    for group in pairs.chunks(jobs) {
        let children = group.iter().map(|(source, image)| start(nvcc, source, image));
        for (mut child, (source, _)) in children.collect::<Result<Vec<_>, _>>()?.into_iter().zip(group) {
            let status = child.wait()?;
            if !status.success() {
                return Err(format!("nvcc on {}: {status}; its messages are above", source.display()).into());
            }
        }
    }
    Ok(images)
}

fn start(nvcc: &Path, source: &Path, image: &Path) -> std::io::Result<Child> {
    let mut command = Command::new(nvcc);
    command.args(["--fatbin", "-std=c++17", "-O3", "-Ikernels/include", "-Xfatbin", "-compress-all"]);
    let is_for_hopper = source.file_stem().is_some_and(|stem| stem.to_string_lossy().ends_with("_sm90a"));
    for architecture in if is_for_hopper { HOPPER } else { ARCHITECTURES } {
        command.args([OsString::from("-gencode"), architecture.into()]);
    }
    command.arg(source).arg("-o").arg(image).spawn()
}

/// `&[(name, bytes)]` as Rust source.
fn table(images: &[PathBuf]) -> Result<String, std::fmt::Error> {
    let mut text = String::from("&[\n");
    for image in images {
        let name = image.file_stem().unwrap_or_default().to_string_lossy();
        writeln!(text, "    ({name:?}, include_bytes!({:?})),", image.display().to_string())?;
    }
    text.push_str("]\n");
    Ok(text)
}
