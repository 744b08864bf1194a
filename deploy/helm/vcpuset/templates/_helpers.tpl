{{/* Labels that every object has beside those of the shipped manifests; Helm's conventions. */}}
{{- define "vcpuset.helmLabels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service | quote }}
{{- end }}

{{/* What selects the pods of a kind; takes the kind. The same as without Helm, and never to be changed. */}}
{{- define "vcpuset.selector" -}}
app.kubernetes.io/name: vcpuset
app.kubernetes.io/component: {{ . }}
{{- end }}

{{/* All labels of an object of a kind; takes a list of the root and the kind. */}}
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
A manifest of the kustomize folders (files/ links to them), with Helm's labels and the values' names put in. Policies and
roles are written once, there: a rule that two places must agree on is soon two rules. Takes a list of the root and the path.
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
{{- $text = $text | replace "namespace: vcpuset-system\n" (printf "namespace: %q\n" $root.Values.controller.namespace.name) -}}
{{- $text = $text | replace "resourceNames: [vcpuset-controller]" (printf "resourceNames: [%q]" $root.Values.controller.leaderElection.leaseName) -}}
{{- $text -}}
{{- end }}

{{/* A shipped Namespace; takes a list of the root, the kind and its values. Helm makes the release's own by itself. */}}
{{- define "vcpuset.namespace" -}}
{{- $root := index . 0 -}}{{- $kind := index . 1 -}}{{- $namespace := index . 2 -}}
{{- if and $namespace.create (ne $namespace.name $root.Release.Namespace) }}
{{- $shipped := include "vcpuset.shipped" (list $root (printf "files/%s/namespace.yaml" $kind)) }}
{{- regexReplaceAll "\n  name: vcpuset-[a-z]+\n" $shipped (printf "\n  name: %q\n" $namespace.name) }}
{{- end }}
{{- end }}

{{/* Options that both kinds have. */}}
{{- define "vcpuset.arguments" -}}
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
{{- with .Values.watch.labelSelector }}
- {{ printf "--label-selector=%s" . | quote }}
{{- end }}
{{- range .Values.extraArgs }}
- {{ . | quote }}
{{- end }}
{{- if hasKey .Values "metricsSetLimit" }}
- --metrics-set-limit={{ .Values.metricsSetLimit | int64 }}
{{- end }}
{{- end }}

{{/* From the name of the container's image to the end of its probes; what both kinds have. */}}
{{- define "vcpuset.container" -}}
ports:
- name: http
  containerPort: 8080
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

{{/* Where to schedule the pods of a kind; takes its values. */}}
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

{{/* What every kind's NetworkPolicy lets in, and the way to the API server. */}}
{{- define "vcpuset.networkRules" -}}
ingress:
- from:
  - namespaceSelector:
      matchLabels:
        {{- toYaml (.Values.networkPolicy.metricsNamespaceLabels | default (dict "vcpuset.dev/metrics" "allowed")) | nindent 8 }}
  ports:
  - {protocol: TCP, port: http}
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
