//! `quire serve`: listeners first, so that health answers while weights load; then the model; then, at the end, a drain.

use std::collections::BTreeMap;
use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use quire_core::FinishReason;
use quire_engine::metrics::{self as engine_metrics, EngineMetrics};
use quire_http::{AppState, HttpConfig};
use quire_llm::{Lifecycle, Llm};
use quire_tenancy::{AuditLog, Tenancy};
use tokio::net::{TcpListener, TcpSocket};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::args::{LogFormat, ServerArgs};
use crate::audit;
use crate::cli::ServeArgs;
use crate::config::check_server;
use crate::loading::{self, Audience, Loaded, Served};
use crate::lora;
use crate::metrics::{self, MetricsPage};
use crate::model::ModelSource;
use crate::signals::Signals;
use crate::targets::Targets;
use crate::tenants;
use crate::tls;
use crate::{Failure, Result, admin, machine};

/// I/O threads at most: a step's results wake each once, and more would only take cores from the model.
const MAX_IO_THREADS: u32 = 2;
/// How often the metrics page is kept tidy.
const UPKEEP_INTERVAL: Duration = Duration::from_secs(1);
/// Time for streams to send their final event once they were ended.
const FINAL_EVENTS: Duration = Duration::from_secs(2);
/// Time for connections to close behind that.
const CLOSE: Duration = Duration::from_secs(6);
/// The same after a device error: whoever restarts the process is waiting.
const CLOSE_DEAD: Duration = Duration::from_secs(2);
/// Connections that the kernel accepts before we do (at most its net.core.somaxconn). One that finds the queue full tries
/// again only after a second, so a burst of clients must fit; the usual 128 is too few.
const BACKLOG: u32 = 4096;
/// Largest gRPC message, as for HTTP bodies.
const MAX_MESSAGE_BYTES: usize = 8 << 20;
/// Calls at once on one gRPC connection.
const MAX_GRPC_STREAMS: u32 = 1024;

/// Serves until a signal or a device error.
pub(crate) fn serve(
    args: &ServeArgs,
    settings: &BTreeMap<String, String>,
    out: &mut impl Write,
) -> Result<()> {
    let start = Instant::now();
    check_server(&args.server)?;
    Targets::of(&args.server)?;
    let source = ModelSource::resolve(args.engine.model.as_deref())?;
    let name = args.server.served_model_name.clone().unwrap_or_else(|| source.default_name());
    lora::check_names(&args.server.lora_modules, &name)?;
    let page = metrics::install(args.server.metrics_compat)?;
    // Registers every series before the first scrape can come.
    drop(EngineMetrics::new(&name));
    engine_metrics::set_engine_state(&name, "loading");
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(machine::usable_cores().min(MAX_IO_THREADS) as usize)
        .thread_name("quire-io")
        .enable_all()
        .build()
        .map_err(|error| Failure(format!("cannot start the I/O threads: {error}")))?;
    let outcome = runtime.block_on(async {
        let signals =
            Signals::install().map_err(|error| Failure(format!("cannot listen for signals: {error}")))?;
        let fronts = Fronts::open(&args.server, settings, page).await?;
        let audit = fronts.audit.clone();
        let outcome = Server { args, name, start, fronts, signals }.run(source, out).await;
        audit.flush().await;
        outcome
    });
    // A download or a load may still be running; nothing waits for it.
    runtime.shutdown_background();
    outcome
}

struct Server<'a> {
    args: &'a ServeArgs,
    name: String,
    start: Instant,
    fronts: Fronts,
    signals: Signals,
}

impl Server<'_> {
    async fn run(mut self, source: ModelSource, out: &mut impl Write) -> Result<()> {
        tracing::info!(http = %self.fronts.addresses.http, grpc = %self.fronts.addresses.grpc, model = self.name, "loading");
        let (args, name) = (self.args.engine.clone(), self.name.clone());
        let targets = Targets::of(&self.args.server)?;
        let lora_modules = self.args.server.lora_modules.clone();
        let load = move || {
            let served = Served { name: &name, lora_modules: &lora_modules, to: Audience::Clients };
            loading::load(&args, targets, source, &served, &Handle::current())
        };
        let mut load = tokio::task::spawn_blocking(load);
        let loaded = tokio::select! {
            loaded = &mut load => loaded.map_err(|panic| Failure(format!("loading failed: {panic}")))??,
            () = self.signals.next() => return Ok(()),
        };
        self.run_loaded(&loaded, out).await
    }

    async fn run_loaded(&mut self, loaded: &Loaded, out: &mut impl Write) -> Result<()> {
        // Ready first: whoever reads the announcement may ask at once.
        self.fronts.lifecycle.ready(loaded.llm.clone());
        self.announce(loaded, out);
        engine_metrics::set_engine_state(&self.name, "ready");
        let upkeep = tokio::spawn(keep_up(self.fronts.page.clone(), loaded.llm.clone()));
        let states = tokio::spawn(follow_state(self.fronts.lifecycle.clone(), self.name.clone()));
        let shares =
            tokio::spawn(tenants::follow_shares(self.fronts.tenancy.clone(), loaded.engine.client()));
        let outcome = tokio::select! {
            ended = loaded.engine.ended() => Err(ended),
            () = self.signals.next() => Ok(()),
        };
        let (result, close) = match outcome {
            Ok(()) => {
                self.drain(loaded).await;
                (Ok(()), CLOSE)
            }
            Err(ended) => {
                self.fronts.lifecycle.die();
                engine_metrics::set_engine_state(&self.name, "dead");
                engine_metrics::count_device_error(&self.name);
                let reason = ended
                    .err()
                    .map_or_else(|| "the engine thread ended".to_owned(), |error| error.to_string());
                (Err(Failure(format!("{reason}; device state is unknown, so the server ends"))), CLOSE_DEAD)
            }
        };
        upkeep.abort();
        shares.abort();
        states.abort();
        let closed = tokio::select! {
            () = self.fronts.close(close) => true,
            () = self.signals.next() => false,
        };
        if !closed {
            exit_at_once();
        }
        result
    }

    /// New requests are refused, running ones finish; after the timeout they get a final error event.
    async fn drain(&mut self, loaded: &Loaded) {
        let timeout = self.args.server.shutdown_timeout;
        let client = loaded.engine.client();
        self.fronts.lifecycle.drain();
        engine_metrics::set_engine_state(&self.name, "draining");
        let running = client.snapshot().num_running;
        tracing::info!(running, ?timeout, "draining; a second signal ends at once");
        let finished = tokio::select! {
            () = client.idle() => true,
            () = tokio::time::sleep(timeout) => false,
            () = self.signals.next() => exit_at_once(),
        };
        if finished {
            return;
        }
        tracing::warn!(running = client.snapshot().num_running, "answers were still running; they are ended");
        client.abort_all(FinishReason::Abort);
        if tokio::time::timeout(FINAL_EVENTS, client.idle()).await.is_err() {
            tracing::warn!("the engine did not end every answer in time");
        }
    }

    /// Says what was resolved, and that requests may come.
    fn announce(&self, loaded: &Loaded, out: &mut impl Write) {
        let seconds = self.start.elapsed().as_secs_f64();
        let Addresses { scheme, http, grpc, admin } = self.fronts.addresses;
        if self.args.common.log_format == LogFormat::Json {
            let Loaded { headline, device, config, .. } = loaded;
            tracing::info!(
                model = self.name,
                headline,
                device,
                http = %format_args!("{scheme}://{http}"),
                grpc = %grpc,
                admin = admin.map(tracing::field::display),
                max_model_len = config.limits.max_model_len,
                max_num_seqs = config.limits.max_num_seqs,
                max_num_batched_tokens = config.limits.max_num_batched_tokens,
                max_queued_requests = config.limits.max_queued_requests,
                block_size = config.limits.block_size,
                num_blocks = config.limits.num_blocks,
                kv_cache_dtype = config.runner.kv_dtype.name(),
                quantize = config.runner.quant.name(),
                bits_per_weight = config.weights.bits_per_weight(),
                prefix_cache = config.prefix_cache,
                memory_bytes = config.memory.total_bytes(),
                host_cache_bytes = config.host_bytes(),
                seconds,
                "ready"
            );
            return;
        }
        let Loaded { headline, device, config, .. } = loaded;
        let admin = admin.map_or_else(String::new, |admin| format!("admin    {scheme}://{admin}\n"));
        let text = format!(
            "quire {}\nmodel    {}: {headline}\ndevice   {device}\n{config}\n{admin}http     {scheme}://{http}\n\
             grpc     {grpc}\nready in {seconds:.2} s\n",
            env!("CARGO_PKG_VERSION"),
            self.name,
        );
        if let Err(error) = out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
            tracing::warn!(%error, "cannot print to standard output; serving all the same");
        }
    }
}

/// What a second signal asks for. The status is the one of a process that an interrupt ended.
fn exit_at_once() -> ! {
    tracing::warn!("a second signal: ending at once");
    std::process::exit(130)
}

/// Where we listen.
#[derive(Clone, Copy)]
struct Addresses {
    /// Of HTTP and of the admin API.
    scheme: &'static str,
    http: SocketAddr,
    grpc: SocketAddr,
    admin: Option<SocketAddr>,
}

/// The listeners, serving from the start.
struct Fronts {
    lifecycle: Lifecycle,
    tenancy: Tenancy,
    audit: AuditLog,
    page: MetricsPage,
    addresses: Addresses,
    shutdown: watch::Sender<bool>,
    tasks: Vec<JoinHandle<()>>,
}

impl Fronts {
    async fn open(args: &ServerArgs, settings: &BTreeMap<String, String>, page: MetricsPage) -> Result<Self> {
        let tenancy = tenants::open(args).await?;
        let audit = audit::open(args)?;
        let tls = tls::open(args)?;
        if !args.host.is_loopback() && !tenancy.requires_key() {
            tracing::warn!("{} can be reached from other machines, and no key is needed", args.host);
        }
        let (http, http_address) = bind(args.host, args.port, "port").await?;
        let (grpc, grpc_address) = bind(args.host, args.grpc_port, "grpc-port").await?;
        let (shutdown, _) = watch::channel(false);
        let render = {
            let page = page.clone();
            Arc::new(move || page.render())
        };
        let mut config = HttpConfig::new(tenancy.clone(), render, env!("CARGO_PKG_VERSION"));
        config.audit = audit.clone();
        config.tls = tls.clone();
        let state = AppState::new(config);
        let lifecycle = state.lifecycle().clone();
        let http = tokio::spawn(quire_http::serve(http, state, until(shutdown.subscribe())));
        let config = quire_grpc::ServerConfig {
            lifecycle: lifecycle.clone(),
            tenancy: tenancy.clone(),
            audit: audit.clone(),
            tls: tls.clone(),
            max_message_bytes: MAX_MESSAGE_BYTES,
            max_concurrent_streams: MAX_GRPC_STREAMS,
            version: env!("CARGO_PKG_VERSION"),
        };
        let grpc = quire_grpc::serve(grpc, config, until(shutdown.subscribe()));
        let grpc = tokio::spawn(async {
            if let Err(error) = grpc.await {
                tracing::error!(%error, "the gRPC server failed");
            }
        });
        let mut tasks = vec![http, grpc];
        let mut admin_address = None;
        if let Some((listener, address, config)) =
            admin::open(args, settings, &lifecycle, &tenancy, &audit, tls.as_ref()).await?
        {
            admin_address = Some(address);
            tasks.push(tokio::spawn(quire_http::admin::serve(listener, config, until(shutdown.subscribe()))));
        }
        let scheme = tls::scheme(tls.as_ref());
        let addresses = Addresses { scheme, http: http_address, grpc: grpc_address, admin: admin_address };
        Ok(Self { lifecycle, tenancy, audit, page, addresses, shutdown, tasks })
    }

    /// Stops listening, and waits until what was answered is sent.
    async fn close(&mut self, timeout: Duration) {
        self.shutdown.send_replace(true);
        let all = async {
            for task in &mut self.tasks {
                // A task that panicked has closed its sockets, too.
                let _ = task.await;
            }
        };
        if tokio::time::timeout(timeout, all).await.is_err() {
            tracing::warn!("connections were still open after {timeout:?}");
        }
    }
}

/// Publishes pauses by an administrator; other changes are published where they happen.
async fn follow_state(lifecycle: Lifecycle, name: String) {
    let mut states = lifecycle.subscribe();
    while states.changed().await.is_ok() {
        engine_metrics::set_engine_state(&name, lifecycle.state().name());
    }
}

async fn until(mut shutdown: watch::Receiver<bool>) {
    // A sender that is gone means the same.
    let _ = shutdown.wait_for(|&now| now).await;
}

pub(crate) async fn bind(host: IpAddr, port: u16, flag: &str) -> Result<(TcpListener, SocketAddr)> {
    let address = SocketAddr::new(host, port);
    let fail = |error: std::io::Error| {
        let reason = match error.kind() {
            std::io::ErrorKind::AddrInUse => {
                format!("the port is in use; choose another with --{flag} (0 takes any free one)")
            }
            std::io::ErrorKind::PermissionDenied => {
                format!("ports below 1024 need privileges; choose another with --{flag}")
            }
            std::io::ErrorKind::AddrNotAvailable => {
                "this machine has no such address; check --host".to_owned()
            }
            _ => error.to_string(),
        };
        Failure(format!("cannot listen on {address}: {reason}"))
    };
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() };
    let socket = socket.map_err(fail)?;
    // As `TcpListener::bind` does: connections that wait for their end must not keep a new server from its port.
    socket.set_reuseaddr(true).map_err(fail)?;
    socket.bind(address).map_err(fail)?;
    let listener = socket.listen(BACKLOG).map_err(fail)?;
    let bound = listener.local_addr().map_err(fail)?;
    Ok((listener, bound))
}

/// Moves observations into buckets, and publishes how long the engine has been silent.
async fn keep_up(page: MetricsPage, llm: Llm) {
    let mut ticks = tokio::time::interval(UPKEEP_INTERVAL);
    loop {
        ticks.tick().await;
        page.run_upkeep();
        let engine = llm.engine();
        let snapshot = engine.snapshot();
        let busy = snapshot.num_running + snapshot.num_waiting > 0;
        let age = (engine.now().0 / 1000).saturating_sub(snapshot.last_step_ms) as f64 / 1e3;
        engine_metrics::set_last_step_age(llm.name(), if busy { age } else { 0.0 });
    }
}

#[cfg(test)]
#[path = "serve_tests.rs"]
mod tests;
