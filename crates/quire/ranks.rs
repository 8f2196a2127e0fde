//! From backends to an executor: one model runner, or several in step for `--tensor-parallel-size`.

use quire_backend::{Backend, BackendError, Communicator};
use quire_core::{DType, Executor};
use quire_cpu::{CpuBackend, CpuConfig, Isa, Precision};
use quire_model::Checkpoint;
use quire_runner::tensor_parallel::load_ranks;
use quire_runner::{LoadProgress, ModelRunner, RunnerError, TensorParallel};

use crate::Failure;
use crate::config::Config;

/// The CPU as a checkpoint of `dtype` runs fastest on it, once for each rank with its share of the threads, and what it is in
/// one line.
pub(crate) fn cpu_backends(dtype: DType, config: &Config) -> crate::Result<(Vec<CpuBackend>, String)> {
    let (threads, ranks) = (config.threads, config.tensor_parallel_size);
    let own = (threads / ranks).max(1) as usize;
    let cpu = CpuConfig { threads: own, precision: cpu_precision(dtype), ..CpuConfig::default() };
    let group = Communicator::group(ranks as usize).into_iter();
    let backends: Vec<_> = group
        .map(|rank| Ok(CpuBackend::new(cpu)?.with_kv_memory(config.kv_memory).with_communicator(rank)))
        .collect::<Result<_, BackendError>>()
        .map_err(|error| Failure(format!("cannot use the CPU: {error}")))?;
    let count = |number: usize| format!("{number} thread{}", if number == 1 { "" } else { "s" });
    let threads = match ranks {
        1 => count(own),
        ranks => format!("{ranks} ranks of {}", count(own)),
    };
    let device = format!("cpu, {threads}, {}", isa_name(backends[0].isa()));
    Ok((backends, device))
}

/// How a checkpoint of `dtype` is computed with.
pub(crate) fn cpu_precision(dtype: DType) -> Precision {
    Precision::for_checkpoint(dtype, Isa::detect())
}

const fn isa_name(isa: Isa) -> &'static str {
    match isa {
        Isa::Portable => "portable code",
        Isa::Avx2 => "AVX2",
        Isa::Avx512 => "AVX-512",
        Isa::Avx512Bf16 => "AVX-512 BF16",
    }
}

/// Loads the model, a part of it onto each backend.
pub(crate) fn load<B: Backend>(
    backends: Vec<B>,
    checkpoint: &Checkpoint,
    config: &Config,
    progress: impl FnMut(LoadProgress),
) -> Result<Box<dyn Executor>, RunnerError> {
    let mut runners = load_ranks(backends, checkpoint, &config.runner, progress)?;
    if config.num_host_blocks > 0 {
        let with_blocks = runners.into_iter().map(|runner| runner.with_host_blocks(config.num_host_blocks));
        runners = with_blocks.collect::<Result<_, _>>()?;
    }
    executor(runners)
}

/// The ranks of a model as an executor.
pub(crate) fn executor<B: Backend>(runners: Vec<ModelRunner<B>>) -> Result<Box<dyn Executor>, RunnerError> {
    Ok(match <[_; 1]>::try_from(runners) {
        Ok([runner]) => Box::new(runner),
        Err(runners) => Box::new(TensorParallel::new(runners)?),
    })
}
