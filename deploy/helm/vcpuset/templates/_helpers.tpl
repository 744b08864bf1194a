{{/* Helm's conventional labels, in addition to those of the shipped manifests. */}}
{{- define "vcpuset.helmLabels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service | quote }}
{{- end }}

{{/* The selector labels of a component; takes the component. They are the same as without Helm and must never change. */}}
{{- define "vcpuset.selector" -}}
app.kubernetes.io/name: vcpuset
app.kubernetes.io/component: {{ . }}
{{- end }}

{{/* The end of the names of a controller; takes the name of its shard, which is empty for the controller of all other VCPUSets. */}}
{{- define "vcpuset.suffix" -}}
{{- with . }}-{{ . }}{{ end }}
{{- end }}

{{/* All labels of an object of a component; takes a list of the root and the component. */}}
{{- define "vcpuset.labels" -}}
{{ include "vcpuset.selector" (index . 1) }}
app.kubernetes.io/part-of: vcpuset
{{ include "vcpuset.helmLabels" (index . 0) }}
{{- end }}

{{- define "vcpuset.image" -}}
{{- with .Values.image -}}
{{- if .digest }}{{ .repository }}@{{ .digest }}{{ else }}{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}{{ end -}}
{{- end -}}
{{- end }}

{{/*
A manifest of the kustomize directories (files/ links to them), with Helm's labels and the names from the values. Policies and
roles have a single source, so that the chart and the manifests cannot diverge. Takes a list of the root and the path.
*/}}
{{- define "vcpuset.shipped" -}}
{{- $root := index . 0 -}}
{{- $text := $root.Files.Get (index . 1) -}}
{{- if not $text }}{{ fail (printf "the chart lacks %s: package it from a work tree with its symbolic links" (index . 1)) }}{{ end -}}
{{- $labels := include "vcpuset.helmLabels" $root | nindent 4 -}}
{{- $text = $text | replace "\n    app.kubernetes.io/part-of: vcpuset" (print "\n    app.kubernetes.io/part-of: vcpuset" $labels) -}}
{{- with $root.Values.agent -}}
{{- $text = $text | replace "namespace: vcpuset-agent\n" (printf "namespace: %q\n" .namespace.name) -}}
{{- $text = $text | replace "metadata.name: vcpuset-agent\n" (printf "metadata.name: %q\n" .namespace.name) -}}
{{- $text = $text | replace "serviceaccount:vcpuset-agent:" (printf "serviceaccount:%s:" .namespace.name) -}}
{{- $text = $text | replace "/run/vcpuset" .socketRoot -}}
{{- end -}}
{{- with $root.Values.controller.namespace.name -}}
{{- $text = $text | replace "namespace: vcpuset-system\n" (printf "namespace: %q\n" .) -}}
{{- $text = $text | replace "serviceaccount:vcpuset-system:" (printf "serviceaccount:%s:" .) -}}
{{- end -}}
{{- with $root.Values.metricsAPI.namespace.name -}}
{{- $text = $text | replace "namespace: vcpuset-metrics-api\n" (printf "namespace: %q\n" .) -}}
{{- $text = $text | replace "serviceaccount:vcpuset-metrics-api:" (printf "serviceaccount:%s:" .) -}}
{{- end -}}
{{- $leases := list -}}
{{- range prepend $root.Values.controller.shards "" -}}
{{- $leases = append $leases (printf "%s%s" $root.Values.controller.leaderElection.leaseName (include "vcpuset.suffix" .) | quote) -}}
{{- end -}}
{{- $text = $text | replace "resourceNames: [vcpuset-controller]" (printf "resourceNames: [%s]" (join ", " $leases)) -}}
{{- $text -}}
{{- end }}

{{/* A shipped Namespace; takes a list of the root, the component and its values. Helm creates the release's namespace. */}}
{{- define "vcpuset.namespace" -}}
{{- $root := index . 0 -}}{{- $kind := index . 1 -}}{{- $namespace := index . 2 -}}
{{- if and $namespace.create (ne $namespace.name $root.Release.Namespace) }}
{{- $shipped := include "vcpuset.shipped" (list $root (printf "files/%s/namespace.yaml" $kind)) }}
{{- regexReplaceAll "\n  name: vcpuset-[a-z-]+\n" $shipped (printf "\n  name: %q\n" $namespace.name) }}
{{- end }}
{{- end }}

{{/* Options of both components; takes a list of the root and a label selector in addition to that of the values. */}}
{{- define "vcpuset.arguments" -}}
{{- $selector := list (index . 0).Values.watch.labelSelector (index . 1) | compact | join "," }}
{{- with index . 0 }}
{{- with .Values.logLevel }}
- --log-level={{ . }}
{{- end }}
{{- with .Values.resyncSeconds }}
- --resync-seconds={{ . }}
{{- end }}
{{- with .Values.workers }}
- --workers={{ . }}
{{- end }}
{{- range .Values.watch.namespaces }}
- --namespace={{ . }}
{{- end }}
{{- with $selector }}
- {{ printf "--label-selector=%s" . | quote }}
{{- end }}
{{- range .Values.extraArgs }}
- {{ . | quote }}
{{- end }}
{{- if hasKey .Values "metricsSetLimit" }}
- --metrics-set-limit={{ .Values.metricsSetLimit | int64 }}
{{- end }}
{{- end }}
{{- end }}

{{/* The container of both components, from its ports to its security context. */}}
{{- define "vcpuset.container" -}}
ports:
- name: http
  containerPort: 8080
# Until the first success, the others wait: a start takes one second of CPU, on a saturated node 20 s.
startupProbe:
  httpGet: {path: /healthz, port: http}
  periodSeconds: 2
  timeoutSeconds: 5
  failureThreshold: 60
livenessProbe:
  httpGet: {path: /healthz, port: http}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
readinessProbe:
  httpGet: {path: /readyz, port: http}
  periodSeconds: 5
  timeoutSeconds: 5
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
{{- end }}

{{/* Where to schedule the pods of a component; takes its values. */}}
{{- define "vcpuset.scheduling" -}}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- end }}

{{/* The inbound rules of the operator's NetworkPolicies, and access to the API server. */}}
{{- define "vcpuset.networkRules" -}}
ingress:
- from:
  - namespaceSelector:
      matchLabels:
        {{- toYaml (.Values.networkPolicy.metricsNamespaceLabels | default (dict "vcpuset.dev/metrics" "allowed")) | nindent 8 }}
  ports:
  - {protocol: TCP, port: http}
{{- if .Values.metricsAPI.enabled }}
- from:
  - namespaceSelector:
      matchLabels:
        kubernetes.io/metadata.name: {{ .Values.metricsAPI.namespace.name | quote }}
    podSelector:
      matchLabels:
        {{- include "vcpuset.selector" "metrics-api" | nindent 8 }}
  ports:
  - {protocol: TCP, port: http}
{{- end }}
{{ include "vcpuset.apiServerRule" . }}
{{- end }}

{{/* The outbound rules of every NetworkPolicy, to which others may be added: access to the API server. */}}
{{- define "vcpuset.apiServerRule" -}}
egress:
- ports:
  {{- range .Values.networkPolicy.apiServer.ports }}
  - {protocol: TCP, port: {{ . }}}
  {{- end }}
  {{- with .Values.networkPolicy.apiServer.cidrs }}
  to:
  {{- range . }}
  - ipBlock: {cidr: {{ . | quote }}}
  {{- end }}
  {{- end }}
{{- end }}
