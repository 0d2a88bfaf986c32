"""vLLM's environment variables that may change what is computed."""

from __future__ import annotations

import os


def _each(names: str, reason: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), reason)


LEFT_OUT = {
    **_each(
        "VLLM_TARGET_DEVICE VLLM_MAIN_CUDA_VERSION VLLM_USE_PRECOMPILED VLLM_DOCKER_BUILD_CONTEXT "
        "VLLM_BUILD_COMMIT VLLM_BUILD_PIPELINE VLLM_BUILD_URL VLLM_IMAGE_TAG CMAKE_BUILD_TYPE "
        "NVCC_THREADS VERBOSE CUDA_HOME",
        "how vLLM was built, whose version is a fact",
    ),
    **_each(
        "VLLM_CPU_OMP_THREADS_BIND VLLM_CPU_NUM_OF_RESERVED_CPU VLLM_CPU_CI_ENV",
        "which processors compute",
    ),
    **_each(
        "VLLM_DP_RANK VLLM_DP_RANK_LOCAL VLLM_DP_SIZE VLLM_PP_LAYER_PARTITION "
        "VLLM_RAY_BUNDLE_INDICES VLLM_RAY_PER_WORKER_GPUS VLLM_RAY_DP_PACK_STRATEGY",
        "ranks, and where each of them is",
    ),
    **_each(
        # Of one machine or pod of several that share a directory.
        "VLLM_LOOPBACK_IP VLLM_PROCESS_NAME_PREFIX VLLM_NIXL_SIDE_CHANNEL_PORT "
        "VLLM_EC_SIDE_CHANNEL_HOST VLLM_EC_SIDE_CHANNEL_PORT VLLM_P2P_SIDE_CHANNEL_HOST "
        "VLLM_P2P_SIDE_CHANNEL_PORT VLLM_MOONCAKE_BOOTSTRAP_PORT VLLM_RAY_DP_PLACEMENT_NODE_IPS "
        "MOONCAKE_REQUESTER_LOCAL_HOSTNAME MOONCAKE_PREFERRED_SEGMENT VLLM_GPU_NIC_PCIE_MAPPING "
        "VLLM_NIC_SELECTION_VARS VLLM_NCCL_SO_PATH VLLM_NCCL_INCLUDE_PATH VLLM_CUDART_SO_PATH "
        "VLLM_LORA_RESOLVER_CACHE_DIR VLLM_RUST_FRONTEND_PATH",
        "a place",
    ),
    **_each("VLLM_API_KEY", "a credential"),
    **_each(
        "VLLM_SYSTEM_START_DATE VLLM_GPT_OSS_HARMONY_SYSTEM_INSTRUCTIONS "
        "VLLM_GPT_OSS_SYSTEM_TOOL_MCP_LABELS",
        "text of prompts, whose tokens are hashed",
    ),
    **_each(
        "VLLM_ENGINE_READY_TIMEOUT_S VLLM_USAGE_SOURCE VLLM_CONFIGURE_LOGGING VLLM_TRACE_FUNCTION "
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN VLLM_ALLOW_RUNTIME_LORA_UPDATING "
        "VLLM_ALLOW_INSECURE_SERIALIZATION VLLM_DISABLE_REQUEST_ID_RANDOMIZATION "
        "VLLM_DISABLE_COMPILE_CACHE VLLM_DISABLE_LOG_LOGO VLLM_LOG_BATCHSIZE_INTERVAL",
        "how the engine is run and watched",
    ),
    **_each(
        # vLLM sets these itself, some on one platform only.
        "VLLM_DISABLE_SHARED_EXPERTS_STREAM VLLM_USE_BREAKABLE_CUDAGRAPH VLLM_USE_AOT_COMPILE "
        "VLLM_USE_STANDALONE_COMPILE VLLM_ENABLE_CUDAGRAPH_GC VLLM_USE_V2_MODEL_RUNNER "
        "VLLM_USE_RAY_COMPILED_DAG_CHANNEL_TYPE",
        "how the same operations are run",
    ),
    **_each("VLLM_USE_FLASHINFER_SAMPLER", "what happens to logits, after KV was made"),
}
"""Name -> why it can't change the KV of a token prefix."""


def environment() -> dict[str, str]:
    """Variables that are set, of those that vLLM compiles by, without `LEFT_OUT`.

    Among them are the element types that quantised kernels multiply in, and which experts take a
    token in a simulation.
    """
    from vllm import envs

    names = sorted(set(envs.compile_factors()) - set(LEFT_OUT))
    return {name: os.environ[name] for name in names if name in os.environ}
