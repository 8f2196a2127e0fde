//! Where a model runs: on a GPU, where this build and this machine have one, else on the processor; and why.

use quire_core::{DType, Executor};
use quire_model::{Checkpoint, ModelSpec};
use quire_runner::LoadProgress;

use crate::args::{Device, EngineArgs, ExecutorArg};
use crate::config::Config;
use crate::{Failure, Result};

/// The GPU that `--device` means, or `None` for the processor. With `auto`, a log line says why it is the processor.
///
/// # Errors
/// `--device cuda`, and no GPU can be used.
pub(crate) fn choose(args: &EngineArgs, spec: &ModelSpec) -> Result<Option<Gpu>> {
    if args.device == Device::Cpu || args.executor == ExecutorArg::Mock {
        return Ok(None);
    }
    let dtype = spec.dtype;
    match (unsuited(args, spec).map_or_else(|| Gpu::open(args, dtype), Err), args.device) {
        (Ok(gpu), _) => Ok(Some(gpu)),
        (Err(reason), Device::Cuda) => Err(Failure(format!("--device cuda: {reason}"))),
        (Err(reason), _) => {
            if Gpu::IS_BUILT_IN {
                tracing::info!(reason, "computing on the processor");
            }
            Ok(None)
        }
    }
}

/// Loads the model onto the GPU; `config` gets the cache that the memory left holds.
///
/// # Errors
/// It does not fit, or the device failed.
pub(crate) fn load(
    gpu: Gpu,
    checkpoint: &Checkpoint,
    args: &EngineArgs,
    config: &mut Config,
    progress: impl FnMut(LoadProgress),
) -> Result<Box<dyn Executor>> {
    let (executor, budget) = gpu.load(checkpoint, args, config, progress)?;
    config.take_measured_pool(args, executor.limits().num_blocks, budget)?;
    Ok(executor)
}

/// What was asked for that only the processor can do.
fn unsuited(args: &EngineArgs, spec: &ModelSpec) -> Option<String> {
    let dtype = spec.dtype;
    let kv = kv_dtype(args, dtype);
    if kv != DType::F8E4M3 && kv != activation_dtype(dtype) {
        return Some(format!("--kv-cache-dtype {kv} is not supported on CUDA; use auto or fp8"));
    }
    if args.block_size < 16 {
        return Some(format!("--block-size {} is not supported on CUDA; use 16, 32 or 64", args.block_size));
    }
    None
}

/// What activations are stored as, for a checkpoint of `dtype`.
fn activation_dtype(dtype: DType) -> DType {
    if dtype == DType::F16 { DType::F16 } else { DType::BF16 }
}

/// What keys and values are stored as, for a checkpoint of `dtype`: as asked for, or as activations.
pub(crate) fn kv_dtype(args: &EngineArgs, dtype: DType) -> DType {
    args.kv_cache_dtype.dtype().unwrap_or_else(|| activation_dtype(dtype))
}

#[cfg(feature = "cuda")]
pub(crate) use built_in::Gpu;
#[cfg(not(feature = "cuda"))]
pub(crate) use left_out::Gpu;

#[cfg(feature = "cuda")]
mod built_in {
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::Duration;

    use quire_backend::BackendError;
    use quire_core::{DType, ExecError, Executor};
    use quire_cuda::blaslt::Element;
    use quire_cuda::driver::{CudaError, Event};
    use quire_cuda::{Cuda, CudaOptions, KernelSet, Peaks};
    use quire_model::Checkpoint;
    use quire_runner::LoadProgress;
    use quire_runner::tensor_parallel::load_ranks_measured;

    use crate::args::{EngineArgs, Switch};
    use crate::bench::{Limits, Watch};
    use crate::config::Config;
    use crate::ranks;
    use crate::units::Bytes;
    use crate::{Failure, Result};

    /// `(name, fatbin)` of each source in `kernels/`, compiled by build.rs.
    const IMAGES: &[(&str, &[u8])] = include!(concat!(env!("OUT_DIR"), "/cuda_images.rs"));

    /// A GPU that is ready to load, or several that share a model.
    pub(crate) struct Gpu {
        /// By rank; at least one.
        backends: Vec<Cuda>,
        /// Bytes, on the fullest.
        free: u64,
    }

    impl Gpu {
        pub const IS_BUILT_IN: bool = true;

        /// Opens the first GPU, or as many as the model is to be split over. The error is the reason, in words.
        pub fn open(args: &EngineArgs, dtype: DType) -> std::result::Result<Self, String> {
            let activations = if dtype == DType::F16 { Element::F16 } else { Element::Bf16 };
            let options = CudaOptions {
                activations,
                batch_invariant: args.batch_invariant != Switch::Off,
                algorithm_cache: cache_folder(),
                kernels: kernel_set(std::env::var("QUIRE_KERNELS").ok().as_deref())?,
                ..CudaOptions::default()
            };
            let ordinals: Vec<_> = (0..args.tensor_parallel_size).collect();
            let backends = Cuda::group(IMAGES, &options, &ordinals).map_err(|error| error.to_string())?;
            let memory = |backend: &Cuda| backend.context().memory().map(|(free, _)| free);
            let free = backends.iter().map(memory).collect::<std::result::Result<Vec<_>, _>>();
            let free = free.map_err(|error| error.to_string())?.into_iter().min().unwrap_or(0);
            Ok(Self { backends, free })
        }

        /// Device memory that nobody uses, on each GPU.
        pub fn free_memory(&self) -> Bytes {
            Bytes(self.free)
        }

        /// Where it computes, in one line.
        pub fn describe(&self) -> String {
            let context = self.backends[0].context();
            let (major, minor) = context.compute_capability();
            let (name, free) = (context.name(), Bytes(self.free));
            let ordinals = match self.backends.len() {
                1 => "cuda:0".to_owned(),
                several => format!("cuda:0 to {}, each", several - 1),
            };
            format!("{ordinals}, {name}, compute capability {major}.{minor}, {free} free")
        }

        /// The backend for a benchmark of its operations, a watch for them, and what they are held against.
        pub fn into_timed(mut self) -> Result<(Cuda, DeviceWatch, Limits)> {
            let mut backend = self.backends.swap_remove(0);
            let Peaks { copy_bytes_s, gemm_flop_s } =
                backend.peaks().map_err(|error| Failure(format!("cannot measure the GPU: {error}")))?;
            let gemm = quire_cpu::Peaks { f32: gemm_flop_s, bf16: gemm_flop_s, int8: gemm_flop_s };
            Ok((backend, DeviceWatch, Limits { read_bytes_s: copy_bytes_s, peaks: gemm }))
        }

        /// An engine on it, and what its memory left for keys and values, on the GPU with least.
        pub fn load(
            self,
            checkpoint: &Checkpoint,
            args: &EngineArgs,
            config: &Config,
            progress: impl FnMut(LoadProgress),
        ) -> Result<(Box<dyn Executor>, Bytes)> {
            let fail = |error: &dyn std::fmt::Display| Failure(format!("cannot load the model: {error}"));
            let budget = AtomicU64::new(u64::MAX);
            let measure = |backend: &Cuda| {
                let own = backend.memory_use()?.kv_budget(args.gpu_memory_utilization);
                budget.fetch_min(own, Ordering::Relaxed);
                Ok(own)
            };
            let runners = load_ranks_measured(self.backends, checkpoint, &config.runner, progress, measure)
                .map_err(|error| fail(&error))?;
            for runner in &runners {
                log_memory(runner.backend(), args.gpu_memory_utilization).map_err(|error| fail(&error))?;
            }
            let executor = ranks::executor(runners).map_err(|error| fail(&error))?;
            Ok((executor, Bytes(budget.into_inner())))
        }
    }

    /// Events of the device's stream.
    #[derive(Clone, Copy)]
    pub(crate) struct DeviceWatch;

    impl Watch<Cuda> for DeviceWatch {
        type Mark = Event;

        fn mark(&self, backend: &Cuda) -> std::result::Result<Event, BackendError> {
            backend.timestamp()
        }

        fn between(&self, begin: &Event, end: &Event) -> std::result::Result<Duration, BackendError> {
            let failed = |error: CudaError| {
                BackendError::Device(ExecError { device: "cuda".into(), message: error.to_string() })
            };
            let milliseconds = end.milliseconds_since(begin).map_err(failed)?;
            Ok(Duration::from_secs_f64(f64::from(milliseconds) / 1e3))
        }
    }

    /// Says where the memory went, and whether all of it is within what may be used.
    fn log_memory(backend: &Cuda, utilization: f64) -> std::result::Result<(), BackendError> {
        let now = backend.memory_use()?;
        let (total, free, outside) = (Bytes(now.total), Bytes(now.free), Bytes(now.outside()));
        let taken: Vec<_> =
            now.taken.iter().map(|(what, bytes)| format!("{what} {}", Bytes(*bytes))).collect();
        let taken = taken.join(", ");
        tracing::info!(%total, %free, %taken, %outside, "device memory");
        let used = now.total - now.free;
        if used as f64 > now.total as f64 * utilization {
            let used = Bytes(used);
            tracing::warn!(%used, utilization, "more device memory is in use than --gpu-memory-utilization says");
        }
        Ok(())
    }

    /// `QUIRE_KERNELS`: `sm90a` tries kernels that have not proven themselves yet.
    fn kernel_set(name: Option<&str>) -> std::result::Result<KernelSet, String> {
        match name {
            None | Some("" | "gen") => Ok(KernelSet::Generic),
            Some("sm90a") => Ok(KernelSet::Sm90a),
            Some(other) => Err(format!("QUIRE_KERNELS={other}: use gen or sm90a")),
        }
    }

    /// `$XDG_CACHE_HOME/quire` or `~/.cache/quire`.
    fn cache_folder() -> Option<std::path::PathBuf> {
        let set =
            |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(std::path::PathBuf::from);
        set("XDG_CACHE_HOME").or_else(|| Some(set("HOME")?.join(".cache"))).map(|folder| folder.join("quire"))
    }
}

#[cfg(not(feature = "cuda"))]
mod left_out {
    use quire_core::{DType, Executor};
    use quire_cpu::CpuBackend;
    use quire_model::Checkpoint;
    use quire_runner::LoadProgress;

    use crate::Result;
    use crate::args::EngineArgs;
    use crate::bench::{HostWatch, Limits};
    use crate::config::Config;
    use crate::units::Bytes;

    /// There is none in a build without the feature `cuda`.
    pub(crate) enum Gpu {}

    impl Gpu {
        pub const IS_BUILT_IN: bool = false;

        pub fn open(_: &EngineArgs, _: DType) -> std::result::Result<Self, String> {
            Err("this build computes on the processor only; build with --features cuda".into())
        }

        pub fn free_memory(&self) -> Bytes {
            match *self {}
        }

        pub fn describe(&self) -> String {
            match *self {}
        }

        pub fn into_timed(self) -> Result<(CpuBackend, HostWatch, Limits)> {
            match self {}
        }

        pub fn load(
            self,
            _: &Checkpoint,
            _: &EngineArgs,
            _: &Config,
            _: impl FnMut(LoadProgress),
        ) -> Result<(Box<dyn Executor>, Bytes)> {
            match self {}
        }
    }
}
