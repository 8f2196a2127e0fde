//! Where the server is in its life, and the model once there is one. Shared by both front ends and the shell.

use std::sync::{Arc, OnceLock};

use quire_core::RequestError;
use quire_engine::EngineState;
use tokio::sync::watch;

use crate::Llm;

/// Loading, then ready, then draining, then dead; back only from a pause, which looks like draining, to ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ServerState {
    /// Weights are being loaded.
    Loading,
    /// Takes requests.
    Ready,
    /// Finishes what it has, takes nothing new.
    Draining,
    /// The device failed.
    Dead,
}

impl ServerState {
    /// As it appears in health answers, errors and logs.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Loading => "loading",
            Self::Ready => "ready",
            Self::Draining => "draining",
            Self::Dead => "dead",
        }
    }
}

/// The state and the model; cheap to clone.
#[derive(Clone)]
pub struct Lifecycle {
    inner: Arc<Inner>,
}

struct Inner {
    state: watch::Sender<ServerState>,
    llm: OnceLock<Llm>,
}

impl Default for Lifecycle {
    fn default() -> Self {
        let (state, _) = watch::channel(ServerState::Loading);
        Self { inner: Arc::new(Inner { state, llm: OnceLock::new() }) }
    }
}

impl Lifecycle {
    /// The state now. An engine that has died makes the server dead before anyone says so.
    pub fn state(&self) -> ServerState {
        let engine_dead = self.inner.llm.get().is_some_and(|llm| llm.engine().state() == EngineState::Dead);
        if engine_dead { ServerState::Dead } else { *self.inner.state.borrow() }
    }

    /// The model, if requests are taken now.
    ///
    /// # Errors
    /// [`RequestError::Unavailable`] while loading, draining or dead.
    pub fn llm(&self) -> Result<&Llm, RequestError> {
        match (self.state(), self.inner.llm.get()) {
            (ServerState::Ready, Some(llm)) => Ok(llm),
            (state, _) => Err(RequestError::Unavailable { state: state.name() }),
        }
    }

    /// The model in whatever state, once it is loaded: for listings and health.
    pub fn loaded(&self) -> Option<&Llm> {
        self.inner.llm.get()
    }

    /// The model is there: requests are taken from now on.
    pub fn ready(&self, llm: Llm) {
        if self.inner.llm.set(llm).is_ok() {
            self.advance(ServerState::Ready);
        }
    }

    /// Takes no new requests from now on; running ones go on.
    pub fn drain(&self) {
        if let Some(llm) = self.inner.llm.get() {
            llm.engine().drain();
        }
        self.advance(ServerState::Draining);
    }

    /// Takes no new requests until [`Lifecycle::resume`]; running ones go on.
    ///
    /// # Errors
    /// The state, if it is neither ready nor paused.
    pub fn pause(&self) -> Result<(), ServerState> {
        self.exchange(ServerState::Ready, ServerState::Draining)
    }

    /// Takes requests again.
    ///
    /// # Errors
    /// The state, if the server loads, is dead, or drains because it is to end.
    pub fn resume(&self) -> Result<(), ServerState> {
        self.exchange(ServerState::Draining, ServerState::Ready)
    }

    /// From one state to another, unless it is there already. The engine drains only when the server is to end, and
    /// then there is no way back.
    fn exchange(&self, from: ServerState, to: ServerState) -> Result<(), ServerState> {
        let mut outcome = Err(self.state());
        self.inner.state.send_if_modified(|state| {
            // Asked under the lock: who drains tells the engine first.
            let is_up = self.loaded().is_some_and(|llm| llm.engine().state() == EngineState::Ready);
            let moves = is_up && *state == from;
            if moves {
                *state = to;
            }
            if is_up && *state == to {
                outcome = Ok(());
            }
            moves
        });
        outcome
    }

    /// The engine has failed.
    pub fn die(&self) {
        self.advance(ServerState::Dead);
    }

    /// Changes of the state, for watchers such as gRPC health.
    pub fn subscribe(&self) -> watch::Receiver<ServerState> {
        self.inner.state.subscribe()
    }

    fn advance(&self, next: ServerState) {
        self.inner.state.send_if_modified(|state| {
            let changed = next > *state;
            *state = next.max(*state);
            changed
        });
    }
}
